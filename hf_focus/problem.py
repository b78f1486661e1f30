"""What one call of focus attention is given, checked once, and what it gives back."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FocusConfigError, bad_value
from .iteration import FEEDBACKS, STOPS


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
    attention_mask: Tensor | None
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

    def __post_init__(self) -> None:
        batch, heads, length = self.query.shape[:3]
        _check("query", self.query, "(B, H, T, D)", self.query.ndim == 4)
        _check("key", self.key, f"({batch}, Hkv, S, {self.query.shape[-1]})", _fits(self.key, batch, self.query))
        _check("key", self.key, f"a number of heads that divides {heads}", heads % max(self.key.shape[1], 1) == 0)
        _check("value", self.value, f"{tuple(self.key.shape[:3])} + (Dv,)", self.value.shape[:3] == self.key.shape[:3])
        for name in ("span", "sharpness"):
            shape = getattr(self, name).shape
            accepted = f"({batch}, {heads} or 1, {length})"
            _check(name, getattr(self, name), accepted, shape in ((batch, heads, length), (batch, 1, length)))
        for name, shape in (
            ("readout_weights", (batch, heads, length, self.max_iterations)),
            ("feedback_matrix", (heads, self.value.shape[-1], self.query.shape[-1])),
            ("mix", (heads,)),
            ("gain", (heads,)),
        ):
            tensor = getattr(self, name)
            _check(name, tensor, f"None or shape {shape}", tensor is None or tuple(tensor.shape) == shape)
        full = (batch, heads, length, self.key.shape[2])
        for name in ("attention_mask", "position_bias"):
            tensor = getattr(self, name)
            fits = tensor is None or (
                tensor.ndim == 4
                and all(given in (1, wanted) for given, wanted in zip(tensor.shape, full, strict=True))
            )
            _check(name, tensor, f"None or a shape that broadcasts to {full}", fits)
        for name, options in (("feedback", FEEDBACKS), ("stop", STOPS)):
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

    def additive_mask(self, mask: Tensor) -> Tensor:
        """A part of the attention mask as what is added to the scores: −inf where a key may not be seen."""
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=self.compute_dtype).masked_fill(~mask, float("-inf"))
        # Models write "never" as the most negative finite number of their dtype
        return mask.to(self.compute_dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def _fits(key: Tensor, batch: int, query: Tensor) -> bool:
    return key.ndim == 4 and key.shape[0] == batch and key.shape[-1] == query.shape[-1]


def _check(name: str, tensor: Tensor | None, accepted: str, holds: bool) -> None:
    if not holds:
        raise FocusConfigError(bad_value(name, tuple(tensor.shape), accepted))
