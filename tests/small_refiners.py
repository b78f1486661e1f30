"""Small refiners with random tables, and steps for them to learn from."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_focus import Refiner

STATES, ACTIONS = 6, 4
SAVED = ("table", "mean", "variance", "num_updates")


def random_refiner(seed: int = 0, **settings: Any) -> Refiner:
    """A small one with a random table."""
    refiner = Refiner(STATES, ACTIONS, **settings)
    refiner.table.copy_(torch.randn(STATES, ACTIONS, generator=torch.Generator().manual_seed(seed)))
    return refiner


def random_step(seed: int = 0, shape: tuple[int, ...] = (2, 3, 5)) -> dict[str, Tensor]:
    """Arguments of `update`."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "state": torch.randint(STATES, shape, generator=noise),
        "action": torch.randint(ACTIONS, shape, generator=noise),
        "reward": torch.randn(shape, generator=noise),
        "next_state": torch.randint(STATES, shape, generator=noise),
        "features": torch.randn(*shape, 4, generator=noise) * 3 + 2,
        "valid": torch.rand(shape, generator=noise) < 0.7,
    }


def assert_close_buffers(one: nn.Module, other: nn.Module) -> None:
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)
