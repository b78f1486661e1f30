"""The model's own attention, limited to `max_dist`: in bands where it can be, else by a dense mask."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .band_attention import band_attention
from .band_mask import BandMask
from .configuration import FocusConfig
from .errors import FocusError
from .masks import limit_distance
from .model_masks import is_traced


@dataclass(frozen=True)
class Call:
    """What transformers calls an attention function with, and what was read from it."""

    attention: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | BandMask | None
    is_causal: bool
    offset: int | Tensor
    kwargs: dict[str, Any]

    def run(self, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.attention(self.module, self.query, self.key, self.value, mask, **self.kwargs)


def attend_globally(call: Call, config: FocusConfig, implementation: str) -> tuple[Tensor, Tensor | None]:
    """The output (B, T, H, Dv) and the weights of the attention of a call, limited to `max_dist` and sinks."""
    length, num_keys = call.query.shape[2], call.key.shape[2]
    # A layer's own window moves on from the first tokens
    sinks = 0 if call.kwargs.get("sliding_window") else config.sink_tokens
    mask = call.mask
    if mask is None and num_keys <= config.max_dist:
        return call.run(None)
    plain_scores = call.kwargs.get("position_bias") is None and call.kwargs.get("softcap") is None
    banded = implementation == "sdpa" and plain_scores and not is_traced()
    if mask is None and banded and isinstance(call.offset, int):
        mask = plain_mask(call.query, num_keys, call.is_causal, call.offset)
    if mask is None or isinstance(mask, Tensor):
        dtype = call.query.dtype if implementation == "eager" else torch.bool
        dtype = dtype if mask is None else mask.dtype
        return call.run(
            limit_distance(
                mask,
                length,
                num_keys,
                call.offset,
                call.is_causal,
                config.max_dist,
                sinks,
                dtype,
                call.key.device,
            )
        )
    if not banded:
        return call.run(mask.dense(config.max_dist, sinks, with_sinks=num_keys > mask.shape[3]))
    attend = partial(attend_block, dropout=call.kwargs.get("dropout") or 0.0, scaling=call.kwargs.get("scaling"))
    output = band_attention(attend, call.query, call.key, call.value, mask, config.max_dist, sinks, call.is_causal)
    return output, None


def check_keys(mask: Tensor | BandMask | None, num_keys: int) -> None:
    """Whether a mask fits the keys that a cache gave.

    Raises:
        FocusError: the cache is a bounded one, and the mask one that knows nothing of it.
    """
    if isinstance(mask, Tensor) and mask.shape[3] not in (1, num_keys):
        raise FocusError(
            f"The attention mask has {mask.shape[3]} keys and the cache gave {num_keys}: with max_dist, generate keeps"
            " the sinks and the last tokens only. Accepted: a 2D attention mask; or, with masks of your own and in"
            " compiled models, past_key_values=DynamicCache(config=model.config) or a static cache."
        )


def plain_mask(query: Tensor, num_keys: int, is_causal: bool, offset: int = 0) -> BandMask:
    """The mask that a model leaves out: all keys up to the query's, or all."""

    def visible(batch: Tensor, head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return keys <= queries if is_causal else queries >= 0

    batch, _, length, _ = query.shape
    return BandMask(
        visible, batch, length, num_keys, query_offset=offset, is_plain=True, dtype=torch.bool, device=query.device
    )


def attend_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """One block of queries: (B, H, r, D) -> (B, r, H, Dv). Grouped heads are not expanded."""
    output = scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return output.transpose(1, 2)
