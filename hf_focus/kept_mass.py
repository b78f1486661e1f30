"""How much of a query's attention each correction of its span would keep: the refiner's reward `"mass"`."""

import torch
from torch import Tensor

from .band_mask import BandMask
from .iteration import FedBack, feed_back, log_weight, soft_span_mask
from .masks import as_additive, read_mask

# Queries that are looked at, and the most scores of a head: a small part of what the local branch computes
MOST_QUERIES = 32
MOST_SCORES = 2**15


def sampled_queries(length: int, num_keys: int) -> slice:
    """Queries at equal distances, the last one among them; all of up to 32. Padding counts: what the refiner learns of
    longer rows depends on the longest one beside them."""
    count = max(1, min(MOST_QUERIES, MOST_SCORES // max(num_keys, 1)))
    stride = -(-length // count)
    return slice((length - 1) % stride, length, stride)


@torch.no_grad()
def kept_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    shorter: Tensor,
    temperature: Tensor,
    rows: slice,
    *,
    readout_weights: Tensor | None,
    feedback_matrix: Tensor | None,
    mix: Tensor | None,
    gain: Tensor | None,
    rotation: Tensor | None,
    attention_mask: Tensor | BandMask | None,
    position_bias: Tensor | None,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    query_offset: int,
    max_span: int,
    ramp: int,
    max_iterations: int,
    feedback: str,
    anchored: bool,
    rotary_pairs: str,
) -> Tensor:
    """Share of the weights of the local attention at `span` that shorter spans keep behind their soft edge, over all
    iterations that are read out: iteration t counts as much as t and all that follow it have in the read-out, which
    need it. No query stops early.

    Args:
        query, key, value: (B, H, T, D), (B, Hkv, S, D) and (B, Hkv, S, Dv).
        span, temperature: of the N queries `rows`, (B, H or 1, N).
        shorter: the A spans that are compared, none above `span`, (B, H or 1, N, A).
        rows: the queries that are looked at.
        the rest: as in `focus_attention`; query_offset is an int.

    Returns:
        (B, H, N, A) in [0, 1], float32 at least; NaN for a query that sees no key.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    first, key, value = query[:, :, rows].to(dtype), key.to(dtype), value.to(dtype)
    places = torch.arange(query.shape[2], device=key.device)[rows, None] + query_offset
    distance = places - torch.arange(key.shape[2], device=key.device)

    def soft_mask(z: Tensor) -> Tensor:
        weight = soft_span_mask(distance.abs(), z[..., None].to(dtype), ramp, max_span)
        return weight.masked_fill(distance < 0, 0) if is_causal else weight

    whole = soft_mask(span)
    bias = log_weight(whole)
    if attention_mask is not None:
        bias = bias + as_additive(read_mask(attention_mask, rows, slice(None)), dtype)
    if position_bias is not None:
        bias = bias + read_mask(position_bias, rows, slice(None)).to(dtype)
    if readout_weights is None:
        needed = first.new_ones(*first.shape[:3], max_iterations)
    else:
        needed = readout_weights[:, :, rows].to(dtype).flip(-1).cumsum(-1).flip(-1)
    rotation = None if rotation is None else rotation[:, :, rows]
    state, summed = FedBack(first, None), torch.zeros((), dtype=dtype, device=key.device)
    for step in range(max_iterations):
        scores = _by_group(state.query, key.transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = (scores / temperature[..., None].to(dtype) + bias).softmax(dim=-1)
        summed = summed + needed[..., step, None] * weights
        if step + 1 < max_iterations:
            output = _by_group(weights, value)
            options = (feedback_matrix, mix, gain, feedback, anchored, rotation, rotary_pairs)
            state = feed_back(state, first, output, *options)
    # What a shorter span's edge leaves of a weight that this span's edge made
    summed = summed / needed.sum(-1, keepdim=True) / whole.masked_fill(whole == 0, 1)
    # Span by span: all at once would take A times the memory
    return torch.stack([(summed * soft_mask(z)).sum(-1) for z in shorter.unbind(-1)], dim=-1)


def _by_group(x: Tensor, of_group: Tensor) -> Tensor:
    """(B, H, N, K) @ (B, Hkv, K, L) -> (B, H, N, L): heads of a group share a matrix, which is not repeated."""
    kv_heads, count = of_group.shape[1], x.shape[2]
    return (x.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ of_group).unflatten(2, (-1, count)).flatten(1, 2)
