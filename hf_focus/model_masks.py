"""The mask functions that transformers calls for patched models: lazy masks where `max_dist` is set."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .band_mask import BandMask, MaskFunction


def with_band_mask(make_mask: Callable[..., Tensor | None], implementation: str) -> Callable[..., Any]:
    """A mask function of transformers that gives a `BandMask` where `max_dist` of the config hides something.

    The tensor stays where only it can say what is visible (masks that users combine, static caches) and in compiled
    graphs; None stays where nothing is hidden.
    """

    def make(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: MaskFunction = causal_mask_function,
        attention_mask: Tensor | BandMask | None = None,
        *,
        config: Any = None,
        use_vmap: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> Tensor | BandMask | None:
        if isinstance(attention_mask, BandMask):
            # Made before, and passed to the model
            return attention_mask
        max_dist = (getattr(config, "focus_config", None) or {}).get("max_dist")
        far = max_dist is not None and (kv_length > max_dist or kv_offset > 0)
        # Cached keys that are not there yet, and keys of another sequence
        others = isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length
        if not far or is_traced() or use_vmap or others or _is_union(mask_function):
            return make_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                config=config,
                use_vmap=use_vmap,
                dtype=dtype,
                device=device,
                **kwargs,
            )
        padding = None
        if attention_mask is not None and not attention_mask.all():
            missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
            padding = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        return BandMask(
            mask_function,
            batch_size,
            q_length,
            kv_length,
            query_offset=q_offset,
            key_offset=kv_offset,
            padding=padding,
            is_plain=padding is None and mask_function in (causal_mask_function, bidirectional_mask_function),
            dtype=dtype if implementation == "eager" else torch.bool,
            device=device,
        )

    return make


def _is_union(function: MaskFunction) -> bool:
    """Whether a mask is the union of two, which may show a query what comes after it."""
    return function.__qualname__.startswith("or_masks.")


def is_traced() -> bool:
    """Whether the model is being compiled or exported: a graph cannot hold a lazy mask."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def as_tensor(mask: Tensor | BandMask | None) -> Tensor | None:
    return mask if mask is None or isinstance(mask, Tensor) else mask.dense().expand(mask.shape)
