"""What a query may see: positions, visible keys and distance limits, read from the mask a model already made."""

import torch
from torch import Tensor

from .band_mask import BandMask

# Additive masks say "never" in many ways: the dtype's most negative number, -inf, -1e9, -1e4
HIDDEN = -5e3


def is_visible(mask: Tensor) -> Tensor:
    """An attention mask, bool or additive, as bool: True where a key may be seen."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask, bool or additive, as what is added to scores: −inf where a key may not be seen."""
    visible = is_visible(mask)
    added = torch.zeros_like(mask, dtype=dtype) if mask is visible else mask.to(dtype)
    return added.masked_fill(~visible, float("-inf"))


def read_mask(mask: Tensor | BandMask, rows: slice, columns: slice, batch: slice = slice(None)) -> Tensor:
    """A part of an attention mask (B, 1 or H, T or 1, S or 1): a view of a tensor, or a `BandMask` evaluated there."""
    if not isinstance(mask, Tensor):
        return mask.read(rows, columns, batch)
    mask = mask[batch] if mask.shape[0] > 1 else mask
    return mask[:, :, rows if mask.shape[2] > 1 else slice(None), columns if mask.shape[3] > 1 else slice(None)]


def find_query_offset(attention_mask: Tensor | None, length: int, num_keys: int, is_causal: bool) -> int | Tensor:
    """Position among the keys of the first query.

    With a static cache the keys are the whole buffer, so the position is not S − T; the last key that a causal query
    may see is its own, and a mask shows which that is. Queries of an image, which see it whole, see later ones: the
    first query of a sequence that is not padding tells. Of queries that all see one another the last key is that of
    the last one.

    Args:
        attention_mask: (B, 1 or H, T, S) or None.
        length, num_keys: T and S.
        is_causal: False: the queries see later ones too, and what a cache holds of before.

    Returns:
        An int, or a 0-dimensional int64 tensor where only the mask knows: nothing is read on the host.
    """
    if length == num_keys:
        return 0
    if attention_mask is None:
        if not is_causal:
            return num_keys - length
        # transformers leaves out the mask for one decoded token, and for the first tokens of an empty static cache
        return num_keys - 1 if length == 1 else 0
    keys = torch.arange(num_keys, device=attention_mask.device)
    last = torch.where(is_visible(attention_mask), keys, -1).amax(dim=-1)
    if length == 1 or not is_causal:
        return last.amax() - (length - 1)
    # Padding on the left sees nothing, and its key may be the last of nobody
    place = last - torch.arange(length, device=last.device)
    first = (last >= 0).to(torch.int8).argmax(dim=-1, keepdim=True)
    found = place.gather(-1, first)
    return torch.where(last.gather(-1, first) >= 0, found, num_keys).amin()


def gather_reach(
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None,
    query_offset: Tensor,
    length: int,
    max_span: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """The keys within `max_span` of the queries, brought to a place that the host knows.

    Returns:
        key, value, attention_mask and position_bias with L = T + max_span − 1 keys (causal; twice the reach if not),
        and the queries' offset among them. Places before the first key or after the last are masked.
    """
    reach = max_span - 1
    index = torch.arange(length + (reach if is_causal else 2 * reach), device=key.device) + query_offset - reach
    exists = (index >= 0) & (index < key.shape[2])
    index = index.clamp(0, key.shape[2] - 1)

    def gathered(mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, index)

    mask = exists[None, None, None]
    if attention_mask is not None:
        attention_mask = gathered(attention_mask)
        if attention_mask.dtype == torch.bool:
            mask = attention_mask & mask
        else:
            mask = attention_mask.masked_fill(~mask, torch.finfo(attention_mask.dtype).min)
    return key.index_select(2, index), value.index_select(2, index), mask, gathered(position_bias), reach


def within_reach(
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BandMask | None,
    position_bias: Tensor | None,
    query_offset: int,
    max_span: int,
) -> tuple[Tensor, Tensor, Tensor | BandMask | None, Tensor | None, int]:
    """What causal queries within `max_span` can reach: all without the first keys, as views; and the queries' offset
    among what is left."""
    first = query_offset - max_span + 1
    if first <= 0:
        return key, value, attention_mask, position_bias, query_offset

    def rest(mask: Tensor | BandMask | None) -> Tensor | BandMask | None:
        if isinstance(mask, BandMask):
            return mask.without_first(first)
        return mask if mask is None or mask.shape[-1] == 1 else mask[..., first:]

    key, value = key[:, :, first:], value[:, :, first:]
    return key, value, rest(attention_mask), rest(position_bias), query_offset - first


def count_visible(
    attention_mask: Tensor | BandMask | None,
    length: int,
    num_keys: int,
    query_offset: int,
    max_span: int,
    is_causal: bool,
    device: torch.device,
    size: int = 64,
) -> Tensor:
    """How many keys each query may see at a distance below `max_span`: (B or 1, H or 1, T) int64, at least 1.

    The mask is read block by block along the band only.
    """
    position = torch.arange(length, device=device) + query_offset
    first = (position - max_span + 1).clamp_min(0)
    last = position if is_causal else (position + max_span - 1).clamp_max(num_keys - 1)
    if attention_mask is None:
        return (last - first + 1).clamp_min(1)[None, None]
    counts = []
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        low = max(start + query_offset - max_span + 1, 0)
        high = min(rows.stop + query_offset + (0 if is_causal else max_span - 1), num_keys)
        keys = torch.arange(low, high, device=device)
        near = (keys >= first[rows, None]) & (keys <= last[rows, None])
        part = read_mask(attention_mask, rows, slice(low, high))
        counts.append((is_visible(part) & near).sum(dim=-1))
    return torch.cat(counts, dim=-1).clamp_min(1)


def count_all_visible(
    attention_mask: Tensor | None, length: int, num_keys: int, is_causal: bool, device: torch.device
) -> Tensor:
    """How many keys each query may see at any distance: (B or 1, H or 1, T), int32 or int64, at least 1.

    Args:
        attention_mask: (B or 1, H or 1, T or 1, S or 1), bool or additive, or None.
        is_causal: what no mask means: the first queries see the first keys up to their own place, else all see all.
    """
    if attention_mask is not None:
        repeats = num_keys // attention_mask.shape[3]
        counts = repeats * is_visible(attention_mask).sum(dim=-1, dtype=torch.int32)
        return counts.clamp_min(1).expand(-1, -1, length)
    if is_causal:
        return torch.arange(1, length + 1, device=device)[None, None]
    return torch.full((1, 1, length), num_keys, device=device)


def own_key_visible(
    attention_mask: Tensor | BandMask | None, length: int, num_keys: int, query_offset: int, device: torch.device
) -> Tensor:
    """Whether a query is a token at all and not padding: (B or 1, T) bool."""
    if attention_mask is None:
        return torch.ones(1, length, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor):
        return attention_mask.read_own()
    # The diagonal first: it is all that is read of an additive mask
    own = attention_mask[:, 0].expand(-1, length, num_keys).diagonal(offset=query_offset, dim1=-2, dim2=-1)
    return is_visible(own)


def limit_distance(
    attention_mask: Tensor | None,
    length: int,
    num_keys: int,
    query_offset: int | Tensor,
    is_causal: bool,
    max_dist: int,
    sink_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask of a global branch that looks `max_dist` tokens far, and at the first `sink_tokens` it may see.

    Args:
        attention_mask: what the model made; None stands for all keys, or all up to the query if causal.
        dtype: torch.bool, or the floating dtype of an additive mask.

    Returns:
        (B or 1, H or 1, T, S).
    """
    distance = torch.arange(length, device=device)[:, None] + query_offset - torch.arange(num_keys, device=device)
    if attention_mask is None:
        visible = (distance >= 0 if is_causal else distance == distance)[None, None]
    else:
        visible = is_visible(attention_mask)
    near = distance.abs() < max_dist
    if sink_tokens:
        # Counting what is visible finds the start of each sequence under padding and packing alike
        near = near | (visible.cumsum(dim=-1) <= sink_tokens)
    visible = visible & near
    if dtype == torch.bool:
        return visible
    base = torch.zeros((), dtype=dtype, device=device) if attention_mask is None else attention_mask
    return torch.where(visible, base, torch.finfo(dtype).min)
