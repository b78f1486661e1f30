"""Matching: the loss that teaches layers limited by `max_dist` to give what the model's own attention gives.

Teacher and pupil are the same weights: each layer computes its unlimited attention as well, passes that on, and is
measured by how far its own output is from it. So no second model is in memory, every layer sees what it would see in
the original, and one forward pass measures all layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FocusConfigError, bad_value

# Of the forward pass under way; a context variable, so that threads do not see each other's
_DISTANCES: ContextVar[list[Tensor] | None] = ContextVar("focus_distances", default=None)


@contextmanager
def collect_distances() -> Iterator[list[Tensor]]:
    """Within it, patched layers pass on their original attention; the list gets a distance of each, a scalar."""
    distances: list[Tensor] = []
    token = _DISTANCES.set(distances)
    try:
        yield distances
    finally:
        _DISTANCES.reset(token)


def match_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Mean distance of all layers from their original attention.

    Args:
        model: patched, perhaps wrapped.
        inputs: of its forward.

    Raises:
        FocusConfigError: no layer could be measured.
    """
    with collect_distances() as distances:
        model(**inputs)
    if not distances:
        accepted = "'task' for a model whose attention is off transformers' interface"
        raise FocusConfigError(bad_value("objective", "match", accepted))
    # Layers may be on several devices
    return torch.stack([distance.to(distances[0].device) for distance in distances]).mean()


def is_matching() -> bool:
    """Whether distances are being collected; never in a compiled graph, which a list cannot be handed out of."""
    return not torch.compiler.is_compiling() and _DISTANCES.get() is not None


def note_distance(output: Tensor, original: Tensor) -> None:
    """Collect |output - original|² over |original|², both (B, T, H, Dv), each head for itself."""
    output, original = output.float(), original.float()
    error = (output - original).square().sum(dim=(0, 1, 3))
    size = original.square().sum(dim=(0, 1, 3))
    _DISTANCES.get().append((error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean())
