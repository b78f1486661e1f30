"""What a local branch tells of each call, and to whom."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A context variable and not a module attribute: threads and nested models do not see each other's observers
_OBSERVERS: ContextVar[tuple[Callable[[nn.Module, "FocusRecord"], None], ...]] = ContextVar(
    "focus_observers", default=()
)


@dataclass(frozen=True)
class FocusRecord:
    """What one attention layer did in one call. All (B, H, T), or (B, 1, T) where the heads share a span.

    span: z in tokens. span_fraction: z / max_span. entropy: nats, of the last local attention. coverage: share of the
    keys in the span with weight above the threshold. iterations: attentions made. action: the refiner's choice, None
    without a refiner. valid: (B or 1, T), False on padding.
    """

    span: Tensor
    span_fraction: Tensor
    entropy: Tensor | None
    coverage: Tensor | None
    iterations: Tensor
    action: Tensor | None
    valid: Tensor

    def detach(self) -> "FocusRecord":
        return FocusRecord(**{k: None if v is None else v.detach() for k, v in self.__dict__.items()})


def is_observed() -> bool:
    """Whether anybody observes. Nobody does in a compiled graph, which cannot call back into Python."""
    return not torch.compiler.is_compiling() and bool(_OBSERVERS.get())


def in_backward() -> bool:
    """Whether a backward pass is running, as when gradient checkpointing calls a layer again. False in a compiled
    graph, which recomputes by other means."""
    # What torch.utils.checkpoint itself asks
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def notify(branch: nn.Module, record: FocusRecord) -> None:
    # Gradient checkpointing calls a layer again inside the backward pass; that is the same call
    if in_backward():
        return
    for observer in _OBSERVERS.get():
        observer(branch, record)


@contextmanager
def observe(observer: Callable[[nn.Module, FocusRecord], None]) -> Iterator[None]:
    """Call `observer(branch, record)` for every call of a local branch made inside the `with`, in this context."""
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)
