"""The global branch under `max_dist`: each block of queries against the sinks and its own band of keys."""

from collections.abc import Callable

import torch
from torch import Tensor

from .band_mask import BandMask

# Measured on a CPU core (8 heads × 64, window 1,024, 16k tokens): 64 to 256 within 12 %, larger ones slower. What
# autograd keeps shrinks with it: keys and values are kept once for each block that reads them.
QUERY_BLOCK = 256

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def band_attention(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BandMask,
    max_dist: int,
    sink_tokens: int,
    is_causal: bool,
    size: int | None = None,
) -> Tensor:
    """Attention to keys at a distance below `max_dist` and to the first `sink_tokens` of the sequence.

    Time O(T·max_dist); memory O(T), and while training O(T·max_dist/size) keys and values, with
    O(B·T·(max_dist + size)) bytes of masks where there is padding or packing.

    Args:
        attend: (query, key, value, mask) -> (B, rows, H, Dv); the mask (B or 1, 1, rows, columns) bool, or None where
            everything may be seen.
        query: (B, H, T, D).
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), or with `sink_tokens` keys more, in front, which a cache kept.
        mask: what the model lets be seen, of T queries and S keys.
        size: queries a block; None: by `max_dist`.

    Returns:
        (B, T, H, Dv).
    """
    length, num_keys = mask.shape[2:]
    kept = key.shape[2] - num_keys
    kept_sinks = (key[:, :, :kept], value[:, :, :kept])
    key, value = key[:, :, kept:], value[:, :, kept:]
    offset = mask.query_offset
    size = size or min(max(max_dist, 64), QUERY_BLOCK)
    outputs, last_mask = [], (None, None)
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        first = min(max(start + offset - max_dist + 1, 0), num_keys - 1)
        last = min(rows.stop + offset + (0 if is_causal else max_dist - 1), num_keys)
        columns = slice(first, max(last, first + 1))
        band = [(key[:, :, columns], value[:, :, columns])]
        # Sinks that are no part of the band
        left_out = first > 0 or kept > 0 or (not is_causal and last < num_keys)
        apart = sink_tokens > 0 and left_out
        if apart:
            places = mask.sinks(sink_tokens, start)
            band.insert(0, kept_sinks if kept else _take(key, value, places - mask.key_offset))
        keys, values = band[0] if len(band) == 1 else (torch.cat(x, dim=2) for x in zip(*band, strict=True))

        past_sinks = first + mask.key_offset >= sink_tokens
        one = mask.is_plain and is_causal and rows.stop - start == 1
        if one and (not apart or (past_sinks and (kept > 0 or mask.key_offset == 0))):
            visible = None
        else:
            # Blocks in the middle of a plain sequence look alike
            looks = (rows.stop - start, columns.stop - first, start + offset - first, apart)
            looks = looks if mask.is_plain and past_sinks else None
            if looks is None or looks != last_mask[0]:
                visible = mask.read_limited(rows, columns, max_dist, sink_tokens)
                if apart:
                    sinks = mask.read_sinks(rows, places, columns, kept > 0)
                    batch = max(len(sinks), len(visible))
                    visible = torch.cat([x.expand(batch, -1, -1, -1) for x in (sinks, visible)], dim=-1)
                last_mask = looks, visible
            visible = last_mask[1]
        outputs.append(attend(query[:, :, rows], keys, values, visible))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _take(key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `columns` (B or 1, n); of those that do not exist, any."""
    columns = columns.clamp(0, key.shape[2] - 1)
    if len(columns) == 1:
        return key.index_select(2, columns[0]), value.index_select(2, columns[0])
    columns = columns[:, None, :, None]
    return tuple(x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
