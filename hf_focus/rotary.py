"""Rotary positions (2104.09864): how a layer's queries are rotated, told to the attention function of that layer.

transformers rotates queries before it calls an attention function, which sees no angles. A hook before the layer's
forward hands them on, as the keyword `focus_rotation`; no forward is copied, and nothing is kept between calls.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .iteration import ROTARY_PAIRS, rotate

KEYWORD = "focus_rotation"
_ROTATES = "apply_rotary_pos_emb"
# Forwards that rotate on some conditions only, of the layer or its config, or scale each feature of what is rotated;
# they are left as if they did not
CONDITIONAL = frozenset(
    {
        "AfmoeAttention",
        "Cohere2Attention",
        "Cohere2MoeAttention",
        "EsmSelfAttention",
        "EvollaSaProtSelfAttention",
        "Exaone4Attention",
        "Exaone4_5_Attention",
        "ExaoneMoeAttention",
        "FalconAttention",
        "FalconFlashAttention2",
        "FlintAttention",
        "HunYuanDenseV1Attention",
        "HunYuanMoEV1Attention",
        "HunYuanVLDenseV1Attention",
        "Kolibri1Attention",
        "SmolLM3Attention",
        "TimesFm2_5Attention",
        "Zamba2Attention",
    }
)


class Rotation(NamedTuple):
    """Of some queries.

    cos, sin: (B or 1, T, R), or R/2 of them. The first R of a head's features are rotated, the others stay.
    pairs: which features are rotated together, see `iteration.turn`.
    angles: how `cos` and `sin` hold them: `"each"` feature's, `"twice"` (their second half is not read, and an angle
        is that of two neighbours) or `"once"` a pair.
    """

    cos: Tensor
    sin: Tensor
    pairs: str = "halves"
    angles: str = "each"

    @property
    def values(self) -> Tensor:
        """Cosines and sines of each of the R features, (2, B or 1, T, R)."""
        both = torch.stack([self.cos, self.sin])
        if self.angles == "each":
            return both
        once = both if self.angles == "once" else both[..., : both.shape[-1] // 2]
        return torch.cat([once, once], dim=-1) if self.pairs == "halves" else once.repeat_interleave(2, dim=-1)


@dataclass(frozen=True)
class RotationHook:
    """Before an attention layer's forward: hands on the angles that it is called with, if it is.

    Args:
        place: of `position_embeddings` among the positional arguments.
        pairs, angles: see `Rotation`.
    """

    place: int
    pairs: str
    angles: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = args[self.place] if len(args) > self.place else kwargs.get("position_embeddings")
        pair = isinstance(given, (tuple, list)) and len(given) == 2
        if not pair or not all(isinstance(x, Tensor) and x.ndim == 3 for x in given):
            return None
        return args, {**kwargs, KEYWORD: Rotation(*given, self.pairs, self.angles)}


def hand_on_rotation(module: nn.Module) -> None:
    """Give an attention module its `RotationHook`, if it rotates its queries in a way that is known here."""
    forward = inspect.unwrap(type(module).forward)
    function = getattr(forward, "__globals__", {}).get(_ROTATES)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    # By the class that the forward is of: others may inherit it
    owner = getattr(forward, "__qualname__", "").partition(".")[0]
    if function is None or _ROTATES not in names or owner in CONDITIONAL:
        return
    parameters = inspect.signature(type(module).forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # Latent attention rotates the last features of a head and not the first
    if not takes_more or "position_embeddings" not in parameters or hasattr(module, "qk_rope_head_dim"):
        return
    layout = find_layout(function)
    if layout is not None:
        # The first parameter is `self`
        place = list(parameters).index("position_embeddings") - 1
        module.register_forward_pre_hook(RotationHook(place, *layout), with_kwargs=True)


def has_known_rotation(module: nn.Module) -> bool:
    """Whether an attention module has its hook."""
    return any(isinstance(hook, RotationHook) for hook in module._forward_pre_hooks.values())


def stop_handing_on(module: nn.Module) -> None:
    """Take the hook off again."""
    hooks = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, RotationHook)]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


@cache
def find_layout(function: Callable[..., Any], size: int = 8) -> tuple[str, str] | None:
    """`pairs` and `angles` of a model's own function, found by what it does to numbers; None: something else.

    Args:
        function: of queries and keys, or one of them, (B, H, T, R), cos and sin (B, T, R or R/2). Whatever it raises
            makes it something else.
    """
    plain = {"dtype": torch.float32, "device": "cpu"}
    # A query a feature: what becomes of it is a row of the rotation's matrix
    features = torch.eye(size, **plain).to(**plain)[None, None]
    once = [torch.linspace(*ends, size // 2, **plain).to(**plain) for ends in ((0.2, 0.9), (0.3, 0.8))]
    once = [x.expand(1, size, -1) for x in once]
    for angles, pairs in product(("each", "twice", "once"), ROTARY_PAIRS):
        # Of two neighbours both are the same
        beside = angles == "each" and pairs == "neighbours"
        repeated = [x.repeat_interleave(2, dim=-1) if beside else x.repeat(1, 1, 2) for x in once]
        rotation = Rotation(*(once if angles == "once" else repeated), pairs, angles)
        expected = rotate(features, rotation.values, pairs)
        found = _try(function, features, rotation)
        if found is not None and found.shape == expected.shape and torch.allclose(found, expected):
            return pairs, angles
    return None


def _try(function: Callable[..., Any], features: Tensor, rotation: Rotation) -> Tensor | None:
    """What a function that may be anybody's makes of `features`; None: nothing of the kind."""
    try:
        # Some take queries and keys, some one of them
        together = "cos" not in list(inspect.signature(function).parameters)[:2]
        with torch.no_grad():
            found = function(*(features,) * (2 if together else 1), rotation.cos, rotation.sin)
        return (found[0] if together else found).to(features.dtype)
    except Exception:
        return None
