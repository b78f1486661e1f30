"""What FocusA does while a model is trained or evaluated, in a few numbers for the log."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .modeling import FocusMixin
from .recording import FocusRecords, record_focus
from .refiner import Refiner

RECORDED = ("span", "span_fraction", "iterations", "entropy", "coverage")


@contextmanager
def record_if_patched(model: nn.Module, wanted: bool = True) -> Iterator[FocusRecords]:
    """`record_focus` where `model` has FocusA and it is wanted, else records that stay empty."""
    if not wanted or not any(isinstance(module, FocusMixin) for module in model.modules()):
        yield FocusRecords()
        return
    with record_focus(model) as records:
        yield records


def mean_records(accelerator: Accelerator, records: FocusRecords) -> dict[str, float]:
    """`focus_span` (tokens), `focus_iterations`, `focus_entropy` (nats), … : means over layers, heads, tokens and
    processes. Empty without records, as in a compiled model. Every process has to call it."""
    means: dict[str, list[Tensor]] = {}
    for layer in records:
        for record in records[layer]:
            for name in RECORDED:
                value = getattr(record, name)
                if value is not None:
                    valid = record.valid[:, None].expand_as(value)
                    means.setdefault(name, []).append(value.float()[valid].mean().to(accelerator.device))
    stacked = {f"focus_{name}": torch.stack(values).mean() for name, values in means.items()}
    return {name: float(value) for name, value in accelerator.reduce(stacked, "mean").items()}


class TableDrift:
    """How far the refiners' tables of a model move."""

    def __init__(self, model: nn.Module) -> None:
        self.refiners = [module for module in model.modules() if isinstance(module, Refiner)]
        self.tables = [refiner.table.clone() for refiner in self.refiners]

    def read(self) -> dict[str, float]:
        """`focus_table_drift`: mean size of the change since the last call, over the entries that changed."""
        if not self.refiners:
            return {}
        changes = [(refiner.table - table).abs() for refiner, table in zip(self.refiners, self.tables, strict=True)]
        moved = sum(int((change > 0).sum()) for change in changes)
        self.tables = [refiner.table.clone() for refiner in self.refiners]
        return {"focus_table_drift": sum(float(change.sum()) for change in changes) / max(moved, 1)}
