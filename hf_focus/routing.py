"""Attention that does not go through transformers' interface: FocusA between its softmax and the rest of its forward.

No forward is copied. While the module's own forward runs, the torch functions it calls are watched: the product of
queries and keys, the softmax over the scores made of it, and the product of these weights and the values, whose result
is the global branch's output. FocusA's output takes its place, and the module's forward goes on with that.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .call_checks import check_call
from .errors import UnsupportedArchitectureError
from .masks import find_query_offset, is_visible, limit_distance
from .projections import layer_feedback
from .rotary import Rotation
from .rotation_hooks import KEYWORD

_PRODUCTS = {
    torch.matmul: ("input", "other"),
    torch.Tensor.matmul: ("input", "other"),
    torch.Tensor.__matmul__: ("input", "other"),
    torch.bmm: ("input", "mat2"),
    torch.Tensor.bmm: ("input", "mat2"),
    torch.baddbmm: ("batch1", "batch2"),
    torch.Tensor.baddbmm: ("batch1", "batch2"),
}
_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
_BADDBMM = {torch.baddbmm, torch.Tensor.baddbmm}


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give `module` another class. accelerate's hooks (`device_map`) keep the forward that they wrap, bound: they get
    that of the new class, and would else go on with the old one."""
    wrapped = getattr(vars(module).get("_old_forward"), "__func__", None)
    follows = wrapped is not None and wrapped is type(module).forward
    module.__class__ = to
    if follows:
        module._old_forward = to.forward.__get__(module)


class Route(TorchFunctionMode):
    """Watches one forward of one attention module, and puts FocusA's output in the place of its own.

    Args:
        module: the attention module, with a branch as its `focus`, which says how scores are made (`RoutedScores`).
        rotation: of its queries, where that is known.
    """

    def __init__(self, module: nn.Module, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.module = module
        self.rotation = rotation
        self.branch = module.focus
        self.product: tuple[Tensor, Tensor, Tensor] | None = None
        self.scores: Tensor | None = None
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.done:
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        if func in _SOFTMAX and self.product is not None and self.scores is None:
            return self._softmax(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _product(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        result = func(*args, **kwargs)
        left, right = _operands(func, args, kwargs)
        if self.scores is None:
            # The first product of the forward is that of queries and keys; what follows adds to the scores
            self.product = self.product or (left, right, result)
            return result
        if left.shape[-2:] != self.scores.shape[-2:]:
            return result
        self.done = True
        heads = self.branch.num_heads
        value = _by_head(right, heads)
        query, key = (_by_head(x, heads).to(value.dtype) for x in (self.product[0], self.product[1].mT))
        scores = self.scores if self.scores.ndim == 4 else self.scores.unflatten(0, (-1, heads))
        visible = is_visible(scores)
        bias = None
        if self.branch.route.bias:
            bias = scores - self._scaling(query) * (query.to(scores.dtype) @ _repeated(key, heads).mT.to(scores.dtype))
            bias = bias.masked_fill(~visible, 0)
        output = self._focus(query, key, value, _by_head(result, heads), visible, bias)
        return output.reshape(result.shape)

    def _softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        scores, *rest = args if args else (kwargs.pop("input"),)
        if scores.shape[-2:] != self.product[2].shape[-2:]:
            return func(scores, *rest, **kwargs)
        self.scores = scores
        if self.branch.config.max_dist is not None:
            mask = scores if scores.ndim == 4 else scores.unflatten(0, (-1, self.branch.num_heads))
            scores = self._limited(mask, *scores.shape[-2:], mask.dtype, mask.device).reshape(scores.shape)
        return func(scores, *rest, **kwargs)

    def _limited(
        self, mask: Tensor | None, length: int, num_keys: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """`limit_distance` by the settings of the branch."""
        config, is_causal = self.branch.config, self.branch.route.is_causal
        offset = find_query_offset(mask, length, num_keys, is_causal)
        return limit_distance(
            mask, length, num_keys, offset, is_causal, config.max_dist, config.sink_tokens, dtype, device
        )

    def _fused(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        self.done = True
        mask = attn_mask
        if self.branch.config.max_dist is not None:
            dtype = torch.bool if attn_mask is None else attn_mask.dtype
            mask = self._limited(attn_mask, query.shape[2], key.shape[2], dtype, key.device)
            kwargs["is_causal"] = False
        output = func(query, key, value, attn_mask=mask, **kwargs)
        return self._focus(query, key, value, output, attn_mask, None, kwargs.get("scale"))

    def _focus(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scaling: float | None = None,
    ) -> Tensor:
        """All (B, H, T or S, D or Dv) -> (B, H, T, Dv)."""
        branch, length, num_keys = self.branch, query.shape[2], key.shape[2]
        is_causal = branch.route.is_causal
        check_call(self.module, branch, query, key, value, is_causal)
        focused = branch(
            query,
            key,
            value,
            output.transpose(1, 2),
            mask,
            is_causal=is_causal,
            scaling=self._scaling(query) if scaling is None else scaling,
            position_bias=bias,
            query_offset=find_query_offset(mask, length, num_keys, is_causal),
            layer_feedback=layer_feedback(self.module, branch),
            rotation=self.rotation,
        )
        return focused.transpose(1, 2)

    def _scaling(self, query: Tensor) -> float:
        scaling = self.branch.route.scaling
        return query.shape[-1] ** -0.5 if scaling is None else scaling


class RoutedAttention:
    """Comes before an attention class: its forward, watched."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = Route(self, kwargs.pop(KEYWORD, None))
        with route:
            result = super().forward(*args, **kwargs)
        if not route.done:
            raise UnsupportedArchitectureError(
                f"{type(self).__name__} made no product of attention weights and values that FocusA knows."
            )
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made on demand: what pickles is how to make it
        return _unpickled, (type(self).__mro__[2],), self.__dict__


@cache
def routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """The watched class of an attention class, under its name."""
    return type(base.__name__, (RoutedAttention, base), {"__module__": __name__, "__doc__": base.__doc__})


def unrouted_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """The attention class that a watched one was made of; any other class itself."""
    return module_class.__mro__[2] if issubclass(module_class, RoutedAttention) else module_class


def _unpickled(base: type[nn.Module]) -> nn.Module:
    module_class: Callable[..., Any] = routed_class(base)
    return module_class.__new__(module_class)


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first = 1 if func in _BADDBMM else 0
    found = [kwargs.get(name) for name in _PRODUCTS[func]]
    return tuple(args[first + place] if operand is None else operand for place, operand in enumerate(found))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B·H, T, D) or (B, H, T, D) -> (B, H, T, D)."""
    return x if x.ndim == 4 else x.unflatten(0, (-1, heads))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
