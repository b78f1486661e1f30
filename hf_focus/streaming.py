"""Training on a stream: documents are read, shuffled in a buffer and made into examples as training goes on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset as DocumentStream
from torch.utils.data import IterableDataset

from .arguments import DataArguments, TrainArguments
from .errors import FocusConfigError, bad_value
from .task_types import Task

# Documents tokenized together, and those that tell one stream from another
BATCH = 64
IDENTITY_DOCUMENTS = 32


class ExampleStream(IterableDataset):
    """The examples of a stream of documents, in an order that depends on the seed and the epoch alone.

    Every process reads the whole stream and keeps its share, so that the order does not depend on how many there are.

    Args:
        documents: rows of the source.
        make: documents -> examples; called once an epoch.
        limit: examples of an epoch; None: all.
        shuffle_buffer: documents to draw from at random, once `shuffle` is called; 0: the order of the source.
    """

    def __init__(
        self,
        documents: DocumentStream,
        make: Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]],
        limit: int | None = None,
        shuffle_buffer: int = 0,
    ) -> None:
        self.documents = documents
        self.make = make
        self.limit = limit
        self.shuffle_buffer = shuffle_buffer

    def shuffle(self, seed: int) -> None:
        """Draw documents at random from now on."""
        if self.shuffle_buffer:
            self.documents = self.documents.shuffle(seed=seed, buffer_size=self.shuffle_buffer)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.documents.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, example in enumerate(islice(self.make(self.documents), self.limit)):
            yield {**example, "example": number}


def batched(rows: Iterable[dict[str, Any]], column: str) -> Iterator[dict[str, list[Any]]]:
    """The values of a column, `BATCH` at a time."""
    rows = iter(rows)
    while values := [row[column] for row in islice(rows, BATCH)]:
        yield {column: values}


def stream_identity(documents: DocumentStream, args: DataArguments) -> str:
    """A hash of the first documents and of the sizes of the files."""
    sizes = [Path(name).stat().st_size for name in args.train_files or ()]
    content = json.dumps([sizes, list(documents.take(IDENTITY_DOCUMENTS))], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def check_stream(task: Task, data_args: DataArguments, train_args: TrainArguments, given: Any = None) -> None:
    """Refuse what a stream (`streaming`, or the data `given`), or a packed row, cannot do.

    Raises:
        FocusConfigError: another task than causal LM, no number of steps, or several workers.
    """
    streams = data_args.streaming or isinstance(given, DocumentStream)
    for name, value, default in (("streaming", streams, False), ("packing", data_args.packing, "joined")):
        if value != default and not task.streams:
            raise FocusConfigError(bad_value(name, value, f"{default!r} for {task.name}"))
    if not streams:
        return
    if train_args.max_steps is None:
        raise FocusConfigError(bad_value("max_steps", None, "a number with --streaming: a stream has no known length"))
    if train_args.num_workers > 1:
        # Each would read documents of its own, in an order that depends on how many there are
        raise FocusConfigError(bad_value("num_workers", train_args.num_workers, "0 or 1 with --streaming"))
