"""Small helpers that several test files share."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_focus import FocusConfig
from hf_focus.branch import FocusBranch

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 6, 5


def fill(module: nn.Module, std: float = 0.3, seed: int = 0) -> nn.Module:
    """Random weights and Q-tables, as if trained. A tensor's values depend on its name, its shape and `seed`."""
    tables = ((name, buffer) for name, buffer in module.named_buffers() if name.endswith("table"))
    for name, tensor in (*module.named_parameters(), *tables):
        noise = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        tensor.data.copy_(torch.randn(tensor.shape, generator=noise) * (1 if name.endswith("table") else std))
    return module


def branch(seed: int = 0, join: bool = True, **settings: Any) -> FocusBranch:
    """A branch that acts, in eval mode. Sequences of 16 and more tokens are longer than its span."""
    small = {"max_span": 8, "ramp": 4, "max_iterations": 3, "base_threshold": 1e-3, "refiner": True}
    config = FocusConfig.build(small, **settings)
    return fill(FocusBranch(config, HEADS, DIM, VALUE_DIM, join=join), seed=seed).eval()


def branch_inputs(
    length: int = 16, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and global output for `branch`."""
    noise = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, HEADS, length, DIM),
        (batch, KV_HEADS, length, DIM),
        (batch, KV_HEADS, length, VALUE_DIM),
        (batch, length, HEADS, VALUE_DIM),
    )
    return tuple(torch.randn(shape, generator=noise).to(dtype) for shape in shapes)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all buffers."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_buffers(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def assert_every_parameter_learns(module: nn.Module) -> None:
    """Every parameter has a finite gradient that is not all zero."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor has that an operation makes, views of it counted as what they view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result
