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
from .errors import FocusConfigError, FocusDataError, bad_value
from .task_types import Task

# Documents tokenized together, and those that tell one stream from another
BATCH = 64
IDENTITY_DOCUMENTS = 32


class ExampleStream(IterableDataset):
    """The examples of a stream of documents; iterated as it is, in the order of the source.

    Args:
        documents: rows of the source.
        make: batches of documents, column -> values -> examples; called once a pass.
        limit: examples of a pass; None: all.
        shuffle_buffer: documents that `in_order` draws from at random; 0: the order of the source.
        argument: name of the argument the documents came from, for messages.
    """

    def __init__(
        self,
        documents: DocumentStream,
        make: Callable[[Iterable[dict[str, list[Any]]]], Iterator[dict[str, Any]]],
        limit: int | None = None,
        shuffle_buffer: int = 0,
        argument: str = "dataset",
    ) -> None:
        self.documents = documents
        self.make = make
        self.limit = limit
        self.shuffle_buffer = shuffle_buffer
        self.argument = argument

    def in_order(self, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The examples of one pass, in an order that depends on the seed and the pass alone; without a buffer, in that
        of the source.

        Raises:
            FocusDataError: there are none.
        """
        documents = self.documents
        if self.shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            documents.set_epoch(epoch)
        yield from self._numbered(documents)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._numbered(self.documents)

    def _numbered(self, documents: DocumentStream) -> Iterator[dict[str, Any]]:
        number = -1
        # In batches: one by one, `datasets` would draw another order in a worker of a DataLoader
        for number, example in enumerate(islice(self.make(documents.iter(BATCH)), self.limit)):
            yield {**example, "example": number}
        if number < 0:
            raise FocusDataError(bad_value(self.argument, "a stream without text", "documents that hold text"))


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
