"""The attention function that transformers calls: the model's own attention, and FocusA where a layer has it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .band_mask import BandMask
from .call_checks import check_call
from .discovery import eager_attention, interface_of
from .errors import FocusConfigError, bad_value
from .global_branch import Call, attend_globally, check_keys
from .masks import count_all_visible, find_query_offset
from .matching import is_matching, note_distance
from .model_masks import with_band_mask
from .projections import layer_feedback
from .rotation_hooks import KEYWORD

PREFIX = "focus|"
# Attention of the global branch; each has its name here and in `config._attn_implementation`, behind the prefix
GLOBAL_IMPLEMENTATIONS = ("sdpa", "eager")


def focus_name(implementation: str) -> str:
    """`"sdpa"` -> `"focus|sdpa"`.

    Raises:
        FocusConfigError: an implementation that the global branch cannot use.
    """
    implementation = global_name(implementation)
    if implementation not in GLOBAL_IMPLEMENTATIONS:
        accepted = " or ".join(map(repr, GLOBAL_IMPLEMENTATIONS))
        raise FocusConfigError(bad_value("attn_implementation", implementation, accepted))
    return PREFIX + implementation


def global_name(implementation: str | None) -> str | None:
    """`"focus|sdpa"` -> `"sdpa"`; anything else is returned as it is, bare `"focus"` as None."""
    if implementation == PREFIX[:-1]:
        return None
    return implementation.removeprefix(PREFIX) if implementation else implementation


def _global_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return eager_attention(module) if implementation == "eager" else interface_of(module)[implementation]


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BandMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    rotation = kwargs.pop(KEYWORD, None)
    attention = _global_attention(module, implementation)
    branch = getattr(module, "focus", None)
    lazy = attention_mask is not None and not isinstance(attention_mask, Tensor)
    if branch is None:
        return attention(module, query, key, value, attention_mask.dense() if lazy else attention_mask, **kwargs)
    length, num_keys = query.shape[2], key.shape[2]
    if branch.config.max_dist is not None:
        check_keys(attention_mask, num_keys)
    is_causal = _is_causal(
        module, branch, implementation, kwargs.get("is_causal"), attention_mask is not None or length != num_keys
    )
    check_call(module, branch, query, key, value, is_causal)
    offset = attention_mask.query_offset if lazy else find_query_offset(attention_mask, length, num_keys, is_causal)

    original = None
    if is_matching():
        mask = attention_mask.dense().expand(attention_mask.shape) if lazy else attention_mask
        with torch.no_grad():
            original, _ = attention(module, query, key, value, mask, **kwargs)
    if branch.config.max_dist is None:
        asking = query
        if branch.global_temperature is not None:
            hides = implementation == "sdpa" and _sdpa_is_causal(module, kwargs.get("is_causal"), length)
            seen = count_all_visible(attention_mask, length, num_keys, hides, query.device)
            asking = branch.global_temperature(query, seen)
        output, weights = attention(module, asking, key, value, attention_mask, **kwargs)
    else:
        call = Call(attention, module, query, key, value, attention_mask, is_causal, offset, kwargs)
        output, weights = attend_globally(call, branch.config, implementation)
    if lazy:
        # Sinks that a cache kept are in front; the local branch reads on from the first key of the window
        kept = num_keys - attention_mask.shape[3]
        key, value = key[:, :, kept:], value[:, :, kept:]
        attention_mask = None if attention_mask.is_plain else attention_mask
    output = branch(
        query,
        key,
        value,
        output,
        attention_mask,
        is_causal=is_causal,
        query_offset=offset,
        layer_feedback=layer_feedback(module, branch),
        rotation=rotation,
        **{name: kwargs.get(name) for name in ("scaling", "softcap", "position_bias", "sliding_window")},
    )
    if original is not None:
        note_distance(output, original)
        return original, None
    return output, weights


def _is_causal(module: nn.Module, branch: nn.Module, implementation: str, given: bool | None, masked: bool) -> bool:
    if branch.causal is not None:
        return branch.causal
    # As transformers' sdpa reads it, where eager attention knows masks only; a decoder may say False all the same
    # where its mask or the cache does the work
    said = getattr(module, "is_causal", implementation != "eager") if given is None else given
    return bool(said or getattr(module, "is_causal", False) or (masked and getattr(module, "is_decoder", False)))


def _sdpa_is_causal(module: nn.Module, given: bool | None, length: int) -> bool:
    """What transformers' sdpa attention makes of a missing mask."""
    return length > 1 and (getattr(module, "is_causal", True) if given is None else given)


def register_interface() -> None:
    """Make `"focus|sdpa"` and `"focus|eager"` known to transformers, each with the masks of the attention it wraps."""
    for implementation in GLOBAL_IMPLEMENTATIONS:

        def attend(module: nn.Module, *args: Any, _implementation: str = implementation, **kwargs: Any) -> Any:
            return _attend(_implementation, module, *args, **kwargs)

        AttentionInterface.register(PREFIX + implementation, attend)
        make_mask = with_band_mask(ALL_MASK_ATTENTION_FUNCTIONS[implementation], implementation)
        AttentionMaskInterface.register(PREFIX + implementation, make_mask)
