"""The span penalty: the mean span of all layers, as a share of `max_span`, added to a model's loss."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .errors import FocusConfigError, bad_value

# Mean spans of the forward pass under way: a context variable, so that threads do not see each other's
_SPANS: ContextVar[list[Tensor] | None] = ContextVar("focus_spans", default=None)


def note_mean_span(fraction: Tensor, valid: Tensor, trainable: bool) -> None:
    """Called by each local branch: its spans enter the penalty of the forward pass under way, if there is one.

    The mean is computed in any case: under gradient checkpointing the recomputation, which nobody collects, must do
    the same work.

    Args:
        fraction: s (B, H or 1, T).
        valid: (B or 1, T) bool, False on padding.
        trainable: whether the predictor is trained, so that its span must have a gradient.

    Raises:
        FocusConfigError: the span has no gradient, as under reentrant gradient checkpointing.
    """
    weight = valid[:, None].expand_as(fraction).to(fraction.dtype)
    mean = (fraction * weight).sum() / weight.sum().clamp_min(1)
    spans = _SPANS.get()
    if spans is None:
        return
    if trainable and not mean.requires_grad:
        accepted = "0 with reentrant gradient checkpointing; use_reentrant=False allows more"
        raise FocusConfigError(bad_value("span_penalty", "more than 0", accepted))
    spans.append(mean)


def with_span_penalty(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that adds `span_penalty` times the mean span to the loss it returns, while training.

    Raises, when called:
        FocusConfigError: the model returns no loss that the penalty could be added to, or is compiled.
    """
    parameters = inspect.signature(forward)

    # Trainer and generate read the signature, which `wraps` keeps
    @functools.wraps(forward)
    def penalized(self: Any, *args: Any, **kwargs: Any) -> Any:
        # None: FocusA was taken off a model whose forward something else wraps, and still calls this one
        settings = getattr(self.config, "focus_config", None)
        weight = 0 if settings is None else settings["span_penalty"]
        if not weight or not self.training or not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise FocusConfigError(bad_value("span_penalty", weight, "0 under torch.compile"))
        if _SPANS.get() is not None:
            # An inner model: the outermost one has the loss
            return forward(self, *args, **kwargs)
        spans: list[Tensor] = []
        token = _SPANS.set(spans)
        try:
            outputs = forward(self, *args, **kwargs)
        finally:
            _SPANS.reset(token)
        labels = parameters.bind_partial(self, *args, **kwargs).arguments.get("labels")
        if labels is not None and getattr(self, "loss_type", None) == "ForCausalLM":
            labels = labels[..., 1:]
        share = _share_of_batch(kwargs.get("shift_labels", labels), kwargs.get("num_items_in_batch"))
        # Layers may be on several devices
        spans = [span.to(spans[0].device) for span in spans]
        return _add_to_loss(outputs, weight * torch.stack(spans).mean() * share, weight)

    return penalized


def _share_of_batch(labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """With gradient accumulation Trainer divides the loss of a part by the targets of the whole: so is the penalty."""
    return 1.0 if labels is None or num_items is None else (labels != -100).sum() / num_items


def _add_to_loss(outputs: Any, penalty: Tensor, weight: float) -> Any:
    if isinstance(outputs, tuple):
        loss = outputs[0] if outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0 else None
    else:
        loss = outputs.get("loss")
    if loss is None:
        accepted = "0 where the model returns no loss (no labels given, label smoothing, a loss of your own)"
        raise FocusConfigError(bad_value("span_penalty", weight, accepted))
    if isinstance(outputs, tuple):
        return (loss + penalty.to(loss.device), *outputs[1:])
    outputs["loss"] = loss + penalty.to(loss.device)
    return outputs
