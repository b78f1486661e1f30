"""Training batches: one endless stream, cut the same way however many processes read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .collators import Batch, ReproducibleCollator, stable_seed


@dataclass(frozen=True)
class _Order:
    """Yields (pass, row) for each row of a batch: batches first, first + stride, … of the stream."""

    num_rows: int
    batch_size: int
    seed: int
    first: int
    stride: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, rows = -1, torch.empty(0)
        for number in count(self.first, self.stride):
            batch = []
            for example in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, place = divmod(example, self.num_rows)
                if epoch != current:
                    noise = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
                    current, rows = epoch, torch.randperm(self.num_rows, generator=noise)
                batch.append((epoch, int(rows[place])))
            yield batch


@dataclass(frozen=True)
class _Rows(TorchDataset):
    rows: Dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[int, list[dict[str, Any]]]:
        return keys[0][0], self.rows.__getitems__([row for _, row in keys])


@dataclass(frozen=True)
class _Collate:
    inner: ReproducibleCollator

    def __call__(self, batch: tuple[int, list[dict[str, Any]]]) -> Batch:
        self.inner.epoch, examples = batch
        return self.inner(examples)


def endless_batches(
    rows: Dataset,
    collator: ReproducibleCollator,
    batch_size: int,
    seed: int,
    first: int = 0,
    stride: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of rows, pass after pass without end, each pass in an order of its own.

    The stream of rows does not depend on who reads it, nor on the batch size: a step sees the same rows as one large
    batch, in several batches, or in several processes, where process p of n reads batches p, p + n, … A batch at the
    end of a pass is filled up from the next one, so that no row is read twice or left out.

    Args:
        rows: examples that `collator` takes.
        collator: is told the pass of the batch's first row.
        seed: of the orders.
        first, stride: which batches of the stream to yield.
        num_workers: as in `DataLoader`.
    """
    return DataLoader(
        _Rows(rows),
        batch_sampler=_Order(len(rows), batch_size, seed, first, stride),
        collate_fn=_Collate(collator),
        num_workers=num_workers,
    )
