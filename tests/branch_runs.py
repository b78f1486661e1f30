"""A branch run once: its output, the record of it, and whether two outputs differ."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import branch_inputs
from torch import Tensor

from hf_focus import FocusRecord
from hf_focus.branch import FocusBranch
from hf_focus.observers import observe


def run(module: FocusBranch, length: int = 16, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    return module(*branch_inputs(length, dtype=dtype), **kwargs)


def observed(module: FocusBranch, call: Callable[[], Any]) -> FocusRecord:
    records: list[FocusRecord] = []
    with observe(lambda _, record: records.append(record)):
        call()
    assert len(records) == 1
    return records[0]


def assert_acts(one: Tensor, other: Tensor) -> None:
    assert one.isfinite().all()
    assert (one - other).abs().max() > 1e-3
