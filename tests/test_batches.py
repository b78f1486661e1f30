"""The endless stream of batches: the same rows for any split over batches and processes, and from any place on."""

from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_focus.batches import endless_batches
from hf_focus.collators import ReproducibleCollator


def stream(rows: int, batch_size: int, first: int = 0, stride: int = 1, seed: int = 0) -> Any:
    """Batches of row numbers."""
    collator = ReproducibleCollator(lambda examples: {"labels": torch.tensor([e["row"] for e in examples])}, len, seed)
    data = Dataset.from_dict({"row": list(range(rows)), "example": list(range(rows))})
    return (batch["labels"] for batch in endless_batches(data, collator, batch_size, seed, first, stride))


def rows_of(batches: Any, count: int) -> list[int]:
    return torch.cat(list(islice(batches, count))).tolist()


@given(rows=st.integers(1, 20), size=st.integers(1, 6), processes=st.integers(1, 4), first=st.integers(0, 9))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_every_split_reads_the_same_rows(rows: int, size: int, processes: int, first: int) -> None:
    count = 6
    expected = rows_of(stream(rows, size * processes), first + count)
    # Processes in turns, begun later
    shares = [stream(rows, size, first * processes + number, processes) for number in range(processes)]
    found: list[Tensor] = [next(share) for _ in range(count) for share in shares]
    assert torch.cat(found).tolist() == expected[first * size * processes :]
    whole = len(expected) // rows * rows
    for start in range(0, whole, rows):
        assert sorted(expected[start : start + rows]) == list(range(rows))


def test_every_pass_has_an_order_of_its_own() -> None:
    rows = rows_of(stream(20, 5), 12)
    assert len({tuple(rows[start : start + 20]) for start in (0, 20, 40)}) == 3
    assert rows != rows_of(stream(20, 5, seed=1), 12)
