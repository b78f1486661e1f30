"""Where in a model numbers first stop being finite."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .refiner import Refiner


def find_nonfinite(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> str | None:
    """The first weight, else module output, else gradient of a module's output, that is not finite.

    The model's gradients and refiners are of no use afterwards.

    Args:
        model: as it was when numbers went wrong.
        losses: runs forward passes, and yields a loss of each, whose backward pass is run.

    Returns:
        for example `the output of model.layers.3.mlp`; None: all are finite.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the weight {name}"
    found: dict[str, str] = {}
    handles = [
        module.register_forward_hook(_watch(name or "the model", found)) for name, module in model.named_modules()
    ]
    for module in model.modules():
        if isinstance(module, Refiner):
            # Back to the table of the passes that are repeated; and nothing is summed over processes
            module.pending.zero_()
            module.eval()
    try:
        for loss in losses():
            if loss.requires_grad:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found.get("output") or found.get("gradient")


def _watch(name: str, found: dict[str, str]) -> Callable[..., None]:
    def see_gradient(gradient: Tensor) -> None:
        if not _is_finite(gradient):
            found.setdefault("gradient", f"the gradient of the output of {name}")

    def see_output(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                if not _is_finite(tensor):
                    found.setdefault("output", f"the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(see_gradient)

    return see_output


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
