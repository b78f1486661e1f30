"""What the predictor reads: the global output of a token, of its window, or of the whole sequence."""

import torch
from torch import Tensor

from .band_mask import BandMask
from .masks import is_visible, read_mask

QUERY_BLOCK = 64


def pool_global(
    output: Tensor, attention_mask: Tensor | BandMask | None, granularity: str, window_size: int
) -> Tensor:
    """Mean of the global output over what surrounds each token. Padding is never part of a mean.

    Args:
        output: (B, T, H, Dv).
        attention_mask: (B, 1 or H, T, T) of a bidirectional model, bool or additive, or None.
        granularity: `"token"` (`output` itself), `"window"` (the `window_size` tokens around, the token's own in the
            middle) or `"sequence"` (all tokens the query may see).
        window_size: tokens.

    Returns:
        (B, T, H, Dv).
    """
    if granularity == "token":
        return output
    batch, length = output.shape[:2]
    flat = output.flatten(2)
    if attention_mask is None and granularity == "sequence":
        return output.mean(dim=1, keepdim=True).expand_as(output)
    reach = length if granularity == "sequence" else window_size // 2
    means = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first, last = max(start - reach, 0), min(stop + reach, length)
        rows = torch.arange(start, stop, device=output.device)[:, None]
        near = ((rows - torch.arange(first, last, device=output.device)).abs() <= reach)[None]
        if attention_mask is not None:
            visible = is_visible(read_mask(attention_mask, slice(start, stop), slice(first, last)))[:, 0]
            near = near & visible.expand(batch, stop - start, last - first)
        share = near.to(flat.dtype)
        share = share / share.sum(dim=-1, keepdim=True).clamp_min(1)
        means.append(share @ flat[:, first:last])
    return torch.cat(means, dim=1).view_as(output)
