"""Training batches: one endless stream, cut the same way however many processes read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from .collators import Batch, ReproducibleCollator, stable_seed
from .streaming import ExampleStream


class Pass(NamedTuple):
    """A pass over the data: its number, from 0, and the rows of all passes before it."""

    number: int
    before: int


FIRST_PASS = Pass(0, 0)
Row = tuple[Pass, dict[str, Any]]


@dataclass(frozen=True)
class _Order:
    """Yields (pass, row number) for each row of a batch: batches first, first + stride, … of the stream."""

    num_rows: int
    batch_size: int
    seed: int
    first: int
    stride: int

    def __iter__(self) -> Iterator[list[tuple[Pass, int]]]:
        current, rows = -1, torch.empty(0)
        for number in count(self.first, self.stride):
            batch = []
            for example in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, place = divmod(example, self.num_rows)
                if epoch != current:
                    noise = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
                    current, rows = epoch, torch.randperm(self.num_rows, generator=noise)
                batch.append((Pass(epoch, epoch * self.num_rows), int(rows[place])))
            yield batch


@dataclass(frozen=True)
class _Rows(TorchDataset):
    rows: Dataset

    def __getitems__(self, keys: list[tuple[Pass, int]]) -> list[Row]:
        rows = self.rows.__getitems__([row for _, row in keys])
        return [(key[0], row) for key, row in zip(keys, rows, strict=True)]


@dataclass(frozen=True)
class _StreamBatches(IterableDataset):
    """Batches first, first + stride, … of a stream: every process reads all of it and keeps its own."""

    stream: ExampleStream
    batch_size: int
    seed: int
    first: int
    stride: int
    begun: Pass

    def _rows(self) -> Iterator[Row]:
        current = self.begun
        while True:
            end = current.before
            for example in self.stream.in_order(self.seed, current.number):
                yield current, example
                end += 1
            current = Pass(current.number + 1, end)

    def __iter__(self) -> Iterator[list[Row]]:
        rows, passed = self._rows(), self.begun.before
        for number in count(self.first, self.stride):
            skipped = number * self.batch_size - passed
            yield list(islice(rows, skipped, skipped + self.batch_size))
            passed += skipped + self.batch_size


@dataclass(frozen=True)
class _Collate:
    inner: ReproducibleCollator

    def __call__(self, rows: list[Row]) -> Batch:
        passes, examples = zip(*rows, strict=True)
        self.inner.epoch = passes[0].number
        return {**self.inner(list(examples)), "last_pass": passes[-1]}


def endless_batches(
    rows: Dataset | ExampleStream,
    collator: ReproducibleCollator,
    batch_size: int,
    seed: int,
    first: int = 0,
    stride: int = 1,
    num_workers: int = 0,
    begun: Pass = FIRST_PASS,
) -> DataLoader:
    """Batches of rows, pass after pass without end, each pass in an order of its own.

    The rows that are read one after the other do not depend on who reads them, nor on the batch size: a step sees the
    same rows as one large batch, in several batches, or in several processes, where process p of n reads batches p,
    p + n, … A batch at the end of a pass is filled up from the next one, so that no row is read twice or left out.

    Args:
        rows: examples that `collator` takes.
        collator: is told the pass of the batch's first row.
        seed: of the orders.
        first, stride: which batches to yield.
        num_workers: as in `DataLoader`; at most 1 for a stream.
        begun: a pass that begins at or before the first row to yield. A stream is read from there on; any row of a
            data set is found without.

    Returns:
        what `collator` makes, plus `last_pass`, the `Pass` of the last row.
    """
    collate = _Collate(collator)
    if isinstance(rows, ExampleStream):
        batches = _StreamBatches(rows, batch_size, seed, first, stride, begun)
        return DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=num_workers)
    order = _Order(len(rows), batch_size, seed, first, stride)
    return DataLoader(_Rows(rows), batch_sampler=order, collate_fn=collate, num_workers=num_workers)
