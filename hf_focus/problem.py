"""What one call of focus attention is given, checked once, and what it gives back."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .band_mask import BandMask
from .errors import FocusConfigError, bad_value
from .iteration import FEEDBACKS, ROTARY_PAIRS, STOPS
from .masks import as_additive, read_mask


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    # torch 2.11 cannot compile the question whether a device knows autocast
    known = kind != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind))
    return known and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Every precision here is chosen; autocast would also choose differently in forward and backward."""
    # An exported graph may run under autocast, without which it was made; else asking is quicker than a context
    compiling = torch.compiler.is_compiling() and x.device.type != "meta"
    return torch.autocast(x.device.type, enabled=False) if compiling or _is_autocast(x) else nullcontext()


def in_one_precision(*tensors: Tensor) -> list[Tensor]:
    """What autocast hands to attention as it would to SDPA's: rotary positions and caches have widened some of it."""
    first = tensors[0]
    if _is_autocast(first) and first.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(first.device.type)
        return [x.to(dtype) for x in tensors]
    return list(tensors)


class FocusOutput(NamedTuple):
    """Result of focus attention.

    output: (B, H, T, Dv), dtype of the query. The rest has no gradient and describes the last attention each query
    made: entropy (B, H, T) in nats; coverage (B, H, T), the share of keys in the span with weight above the threshold;
    iterations (B, H, T) int64, the attentions made. entropy and coverage are None when not asked for.
    """

    output: Tensor
    entropy: Tensor | None
    coverage: Tensor | None
    iterations: Tensor


@dataclass(frozen=True)
class FocusProblem:
    """Arguments of `focus_attention`, which documents them, with every default filled in.

    `sharpness` is 1/temperature; `query_offset` is an int (a tensor offset has been gathered away).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    span: Tensor
    sharpness: Tensor
    readout_weights: Tensor | None
    feedback_matrix: Tensor | None
    mix: Tensor | None
    gain: Tensor | None
    rotation: Tensor | None
    attention_mask: Tensor | BandMask | None
    position_bias: Tensor | None
    is_causal: bool
    scaling: float
    softcap: float | None
    query_offset: int
    max_span: int
    ramp: int
    max_iterations: int
    feedback: str
    anchored: bool
    rotary_pairs: str
    stop: str
    base_threshold: float
    threshold_scale: float
    coverage_threshold: float
    need_statistics: bool

    TENSORS = (
        "query",
        "key",
        "value",
        "span",
        "sharpness",
        "readout_weights",
        "feedback_matrix",
        "mix",
        "gain",
        "position_bias",
    )
    # Those that no gradient is given of come behind
    ALL_TENSORS = (*TENSORS, "rotation", "attention_mask")

    def __post_init__(self) -> None:
        if self.query.ndim != 4:
            raise FocusConfigError(bad_value("query", tuple(self.query.shape), "(B, H, T, D)"))
        if not self.query.is_floating_point():
            raise FocusConfigError(bad_value("query", self.query.dtype, "a floating dtype"))
        batch, heads, length, head_dim = self.query.shape
        fits = self.key.ndim == 4 and self.key.shape[0] == batch and self.key.shape[3] == head_dim
        if not fits or heads % max(self.key.shape[1], 1):
            accepted = f"({batch}, Hkv, S, {head_dim}) with Hkv a divisor of {heads}"
            raise FocusConfigError(bad_value("key", tuple(self.key.shape), accepted))
        kv_heads, num_keys, value_head_dim = *self.key.shape[1:3], self.value.shape[-1]
        shapes = {
            "value": (batch, kv_heads, num_keys, value_head_dim),
            "span": (batch, heads, length),
            "sharpness": (batch, heads, length),
            "readout_weights": (batch, heads, length, self.max_iterations),
            "feedback_matrix": (heads, value_head_dim, head_dim),
            "mix": (heads,),
            "gain": (heads,),
            "rotation": (2, batch, length, 0 if self.rotation is None else self.rotation.shape[-1]),
            "attention_mask": (batch, heads, length, num_keys),
            "position_bias": (batch, heads, length, num_keys),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and not _fits(tensor, shape, name):
                raise FocusConfigError(bad_value(name, tuple(tensor.shape), _shown(shape, name)))
        if self.rotation is not None and (self.rotation.shape[-1] > head_dim or self.rotation.shape[-1] % 2):
            accepted = f"(2, {batch} or 1, {length}, R) with an even R <= {head_dim}"
            raise FocusConfigError(bad_value("rotation", tuple(self.rotation.shape), accepted))
        mask = self.attention_mask
        if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise FocusConfigError(bad_value("attention_mask", mask.dtype, "torch.bool, or a floating dtype"))
        for name, options in (("feedback", FEEDBACKS), ("stop", STOPS), ("rotary_pairs", ROTARY_PAIRS)):
            if getattr(self, name) not in options:
                raise FocusConfigError(bad_value(name, getattr(self, name), " or ".join(map(repr, options))))
        for name in ("max_span", "ramp", "max_iterations"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise FocusConfigError(bad_value(name, getattr(self, name), "an int >= 1"))

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def in_compute_dtype(self) -> "FocusProblem":
        """The same problem with all differentiable tensors in float32, or in float64 if the query is."""
        casts = {name: getattr(self, name) for name in self.TENSORS}
        return replace(self, **{k: v.to(self.compute_dtype) for k, v in casts.items() if v is not None})

    def additive_mask(self, mask: Tensor | BandMask) -> Tensor:
        """A part of the attention mask as what is added to the scores: −inf where a key may not be seen."""
        return as_additive(read_mask(mask, slice(None), slice(None)), self.compute_dtype)


def changed(problem: FocusProblem | None, **changes: Any) -> FocusProblem:
    """`dataclasses.replace` without validating again: parts of a valid problem are valid."""
    part = object.__new__(FocusProblem)
    part.__dict__.update(problem.__dict__ if problem is not None else {}, **changes)
    return part


# Dimensions that may be 1 and then hold for all
_MAY_BE_ONE = {
    "span": (1,),
    "sharpness": (1,),
    "rotation": (1,),
    "attention_mask": (0, 1, 2, 3),
    "position_bias": (0, 1, 2, 3),
}


def _fits(tensor: Tensor, shape: tuple[int, ...], name: str) -> bool:
    free = _MAY_BE_ONE.get(name, ())
    # One comparison a dimension: under torch.compile sizes are symbols, which only that can compare
    return tensor.ndim == len(shape) and all(
        tensor.shape[axis] == size or (axis in free and tensor.shape[axis] == 1) for axis, size in enumerate(shape)
    )


def _shown(shape: tuple[int, ...], name: str) -> str:
    free = _MAY_BE_ONE.get(name, ())
    return f"({', '.join(f'{size} or 1' if axis in free else str(size) for axis, size in enumerate(shape))})"
