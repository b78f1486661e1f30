"""Which attention layers rotate their queries and how, told to the attention function of each layer.

transformers rotates queries before it calls an attention function, which sees no angles. A hook before the layer's
forward hands them on, as the keyword `focus_rotation`; no forward is copied, and nothing is kept between calls.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import FocusConfigError, bad_value
from .rotary import Rotation, find_layout

KEYWORD = "focus_rotation"
_ROTATES = "apply_rotary_pos_emb"
# Classes whose forward rotates on a condition, and what it reads; None: on one of another kind, or it scales each
# feature of what is rotated. Those are left as if they did not rotate
CONDITIONAL: dict[str, Callable[[Any], bool] | None] = {
    "AfmoeAttention": lambda module: module.is_local_attention,
    "Cohere2Attention": lambda module: module.sliding_window is not None,
    "Cohere2MoeAttention": lambda module: module.sliding_window is not None or module.force_rope,
    "EsmSelfAttention": None,
    "EvollaSaProtSelfAttention": None,
    "Exaone4Attention": lambda module: module.sliding_window is None or module.is_sliding,
    "Exaone4_5_Attention": lambda module: module.sliding_window is None or module.is_sliding,
    "ExaoneMoeAttention": lambda module: module.sliding_window is None or module.is_sliding,
    "FalconAttention": None,
    "FalconFlashAttention2": None,
    "FlintAttention": lambda module: module.sliding_window is not None,
    "HunYuanDenseV1Attention": None,
    "HunYuanMoEV1Attention": None,
    "HunYuanVLDenseV1Attention": None,
    "Kolibri1Attention": lambda module: module.sliding_window is None or module.is_sliding,
    "SmolLM3Attention": lambda module: module.use_rope,
    "TimesFm2_5Attention": None,
    "Zamba2Attention": None,
}


@dataclass(frozen=True)
class RotationHook:
    """Before an attention layer's forward: hands on the angles that it is called with, if it is.

    Args:
        place: of `position_embeddings` among the positional arguments.
        pairs, angles: see `Rotation`.
        share: of the pairs of features that the layer itself rotates, the fastest; the others get angles of zero, in
            what it caches and what the global branch reads. The angles that are handed on are whole.
    """

    place: int
    pairs: str
    angles: str
    share: float = 1.0

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = args[self.place] if len(args) > self.place else kwargs.get("position_embeddings")
        pair = isinstance(given, (tuple, list)) and len(given) == 2
        if not pair or not all(isinstance(x, Tensor) and x.ndim == 3 for x in given):
            if self.share < 1 and given is not None:
                accepted = f"1.0 for {type(module).__name__}, which rotates by angles of another kind"
                raise FocusConfigError(bad_value("global_rotation", self.share, accepted))
            return None
        rotation = Rotation(*given, self.pairs, self.angles)
        kwargs = {**kwargs, KEYWORD: rotation}
        if self.share == 1:
            return args, kwargs
        fast = rotation.fast(self.share)[:2]
        if len(args) > self.place:
            return (*args[: self.place], fast, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, "position_embeddings": fast}


def find_rotation(
    module: nn.Module, module_class: type[nn.Module] | None = None
) -> tuple[str | None, RotationHook | None]:
    """How an attention module rotates its queries.

    Args:
        module_class: whose forward says so; None: that of `module`, which may be one that FocusA watches.

    Returns:
        which features its class rotates together, see `Rotation`; None: none, or not in a way that is known here;
        the hook of this layer, if it is one that rotates.
    """
    module_class = type(module) if module_class is None else module_class
    forward = inspect.unwrap(module_class.forward)
    function = getattr(forward, "__globals__", {}).get(_ROTATES)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    # By the class that the forward is of: others may inherit it
    condition = CONDITIONAL.get(getattr(forward, "__qualname__", "").partition(".")[0], lambda module: True)
    parameters = inspect.signature(module_class.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = function is not None and _ROTATES in names and condition is not None
    # Latent attention rotates the last features of a head and not the first
    known = known and takes_more and "position_embeddings" in parameters and "qk_rope_head_dim" not in names
    layout = find_layout(function) if known else None
    if layout is None:
        return None, None
    # The first parameter is `self`
    hook = RotationHook(list(parameters).index("position_embeddings") - 1, *layout)
    try:
        return hook.pairs, hook if condition(module) else None
    except AttributeError:
        # A class of this name that is not the one in the table
        return None, None


def hand_on_rotation(module: nn.Module, hook: RotationHook | None) -> None:
    """Give an attention module its hook, if it has one and has not been given it yet."""
    if hook is not None and hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def stop_handing_on(module: nn.Module) -> None:
    """Take the hook off again."""
    hooks = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, RotationHook)]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
