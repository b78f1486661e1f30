"""How much of a query's attention each correction of its span would keep: the refiner's reward `"mass"`."""

import torch
from torch import Tensor

from .band_mask import BandMask
from .iteration import soft_span_mask
from .masks import as_additive, read_mask

# Queries that are looked at, and the most scores of a head: a small part of what the local branch computes
MOST_QUERIES = 32
MOST_SCORES = 2**16


def sampled_queries(length: int, num_keys: int) -> slice:
    """Queries at equal distances, the last one among them."""
    count = max(1, min(MOST_QUERIES, MOST_SCORES // max(num_keys, 1)))
    stride = -(-length // count)
    return slice((length - 1) % stride, length, stride)


@torch.no_grad()
def kept_mass(
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    sharpness: Tensor,
    rows: slice,
    attention_mask: Tensor | BandMask | None = None,
    position_bias: Tensor | None = None,
    *,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    query_offset: int,
    max_span: int,
    ramp: int,
) -> Tensor:
    """Share of the first attention's weights, over all keys within `max_span`, that a span keeps behind its soft edge.

    Args:
        query, key: (B, H, T, D) and (B, Hkv, S, D).
        spans: the A spans that are compared, in tokens, (B, H or 1, N, A), of the N queries `rows`.
        sharpness: 1/τ of these queries, (B, H or 1, N).
        rows: the queries that are looked at.
        attention_mask, position_bias, the rest: as in `focus_attention`; query_offset is an int.

    Returns:
        (B, H, N, A) in [0, 1], float32 at least; NaN for a query that sees no key.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    grouped = query[:, :, rows].to(dtype).unflatten(1, (key.shape[1], groups))
    scores = (grouped @ key[:, :, None].to(dtype).transpose(-1, -2)).flatten(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores * sharpness[..., None].to(dtype)
    places = torch.arange(*rows.indices(query.shape[2]), device=key.device)[:, None] + query_offset
    distance = places - torch.arange(key.shape[2], device=key.device)
    if attention_mask is not None:
        scores = scores + as_additive(read_mask(attention_mask, rows, slice(None)), dtype)
    if position_bias is not None:
        scores = scores + read_mask(position_bias, rows, slice(None)).to(dtype)
    hidden = distance.abs() >= max_span
    weights = scores.masked_fill(hidden | (distance < 0) if is_causal else hidden, float("-inf")).softmax(dim=-1)
    distance = distance.abs()
    # Span by span: all at once would take A times the memory
    kept = [(weights * soft_span_mask(distance, z[..., None], ramp, max_span)).sum(-1) for z in spans.unbind(-1)]
    return torch.stack(kept, dim=-1)
