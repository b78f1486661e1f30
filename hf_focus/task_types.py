"""What a task of fine-tuning is made of, and what it is made from: the model's config, tokenizer and features."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import DataArguments
from .collators import IGNORED, Batch
from .errors import FocusConfigError, FocusDataError, bad_value
from .packing import hash_code

Scores = dict[str, Tensor | list[Any]]

PERPLEXITY = {"predictions": "nll", "tokens": "tokens", "bytes": "bytes"}
ACCURACY = {"predictions": "predictions", "references": "references"}


@dataclass
class Source:
    """A model as it was given or loaded, and what makes its inputs.

    config: its config, known before its weights are. features: for models that hear; None: not needed. model: None
    until `load_model`. new_parameters: names that the checkpoint did not hold, for example of a new head.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None = None
    new_parameters: list[str] = field(default_factory=list)
    features: FeatureExtractionMixin | None = None


@dataclass(frozen=True)
class Encoded:
    """Examples ready for a collator, and what the model's config has to know about them.

    train: columns of the task and `example`, its number; a stream where `streaming` was asked for. evaluation: the
    same, never a stream, or None. config: settings for the model's config. identity: what tells the training data from
    other data, where the examples themselves cannot.
    """

    train: Dataset | IterableDataset
    evaluation: Dataset | None
    config: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None


@dataclass(frozen=True)
class Task:
    """What distinguishes one task from another.

    Args:
        name: as given to `--task`.
        auto_class: Auto class that the model is loaded with.
        pipeline_tag: for the model card.
        encode: `(train rows, eval rows or None, source, data arguments, tokens in an example) -> Encoded`.
        collator: `(source, data arguments) -> collator`.
        count_targets: batch -> number of terms that the model's loss is the mean of.
        score: `(outputs, batch, source) -> Scores`, one row an example; targets left out are -100.
        reported: results of the metrics that mean something for this task.
        metrics: metric -> its inputs, each the name of a score.
        labels: the data argument that names the column of classes; None: there are no classes.
        targets: what of a batch is kept from the model while it is scored.
        generate: `(model, batch, source) -> Scores` of what the model writes by itself; None: it need not.
        needs_features: whether inputs are made by a feature extractor.
        model_finds_padding: whether the model itself looks for the padding token in its input.
        splits_words: whether texts come as lists of words.
        by_character: whether a document may be cut to hold out evaluation text.
        streams: whether it can be trained on a stream, and with packed rows.
    """

    name: str
    auto_class: type
    pipeline_tag: str
    encode: Callable[[Dataset, Dataset | None, Source, DataArguments, int], Encoded]
    collator: Callable[[Source, DataArguments], Callable[[list[Batch]], Batch]]
    count_targets: Callable[[Batch], int]
    score: Callable[[Any, Batch, Source], Scores]
    reported: tuple[str, ...]
    metrics: dict[str, dict[str, str]] = field(
        default_factory=lambda: {"perplexity": PERPLEXITY, "accuracy": ACCURACY}
    )
    labels: str | None = None
    targets: tuple[str, ...] = ("labels",)
    generate: Callable[[PreTrainedModel, Batch, Source], Scores] | None = None
    needs_features: bool = False
    splits_words: bool = False
    model_finds_padding: bool = False
    by_character: bool = True
    streams: bool = False


def data_argument(args: DataArguments, training: bool) -> str:
    """The argument that the training or evaluation rows came from, for messages."""
    if training:
        return "train_files" if args.train_files else "dataset"
    return "eval_files" if args.eval_files else "eval_split"


def encode_parts(
    train: Dataset, evaluation: Dataset | None, args: DataArguments, encode: Callable[[Dataset, str], Dataset]
) -> tuple[Dataset, Dataset | None]:
    """`encode(rows, argument)` of the training and evaluation rows, with the column `example`, a number each."""
    parts = [
        rows if rows is None else numbered(encode(rows, data_argument(args, training)))
        for rows, training in ((train, True), (evaluation, False))
    ]
    return parts[0], parts[1]


def encode_rows(
    rows: Dataset,
    encode: Callable[..., dict[str, Any]],
    source: Source,
    size: int,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Dataset:
    """`rows` as `encode(batch, tokenizer=…, size=…, code=…, **arguments)` makes them, without the columns they had.

    Args:
        options: of `Dataset.map`, beside batches and the progress bar's name, which they may replace.
    """
    return rows.map(
        encode,
        remove_columns=rows.column_names,
        fn_kwargs={
            "tokenizer": source.tokenizer,
            "size": size,
            "code": hash_code(inspect.getfile(encode)),
            **arguments,
        },
        **{"batched": True, "desc": "Tokenizing", **(options or {})},
    )


def numbered(rows: Dataset) -> Dataset:
    return rows.add_column("example", list(range(len(rows))))


def check_column(rows: Dataset, argument: str, name: str) -> str:
    """`name`, which argument `argument` asks for, if there is such a column.

    Raises:
        FocusDataError: there is none.
    """
    if name not in rows.column_names:
        raise FocusDataError(bad_value(argument, name, f"one of the columns, {rows.column_names}"))
    return name


def check_fast(source: Source, task: str) -> None:
    """Whether the tokenizer knows where its tokens are in the text.

    Raises:
        FocusConfigError: it does not.
    """
    if not source.tokenizer.is_fast:
        accepted = f"a fast one for {task}, which needs the place of each token in the text"
        raise FocusConfigError(bad_value("tokenizer", type(source.tokenizer).__name__, accepted))


def token_scores(logits: Tensor, labels: Tensor, num_bytes: Tensor | None = None) -> Scores:
    """Scores of single tokens: logits (B, T, V), labels (B, T), -100 where nothing is predicted."""
    losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    tokens = (labels != IGNORED).sum(dim=1)
    return {
        "nll": losses.double().sum(dim=1),
        "tokens": tokens,
        "bytes": torch.zeros_like(tokens) if num_bytes is None else num_bytes,
        "predictions": logits.argmax(dim=-1),
        "references": labels,
    }


def score_labels(outputs: Any, batch: Batch, source: Source) -> Scores:
    """Scores of a model that predicts a label at every place."""
    return token_scores(outputs.logits, batch["labels"], batch.get("num_bytes"))


def count_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())
