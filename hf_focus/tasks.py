"""The table of tasks that a model can be fine-tuned for. A new task is a new entry."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from .arguments import DataArguments
from .collators import IGNORED, Batch, CausalCollator, ClassificationCollator, MaskedCollator
from .data import find_text_column
from .errors import FocusConfigError, FocusDataError, bad_value
from .packing import BlockShape, causal_shape, hash_code, masked_shape, pack

Scores = dict[str, Tensor]

_PERPLEXITY = {"predictions": "nll", "tokens": "tokens", "bytes": "bytes"}
_ACCURACY = {"predictions": "predictions", "references": "references"}


@dataclass(frozen=True)
class Encoded:
    """Examples ready for a collator, and what the model's config has to know about them.

    train: columns of the task and `example`, its number. evaluation: the same, or None. config: settings for the
    model's config.
    """

    train: Dataset
    evaluation: Dataset | None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What distinguishes one task from another.

    Args:
        name: as given to `--task`.
        auto_class: Auto class that the model is loaded with.
        pipeline_tag: for the model card.
        encode: `(train rows, eval rows or None, tokenizer, data arguments, tokens in an example) -> Encoded`.
        collator: `(tokenizer, data arguments) -> collator`.
        count_targets: labels of a batch -> number of terms that the model's loss is the mean of.
        score: `(logits, batch) -> Scores`, one row an example; targets left out are -100.
        metrics: metric -> its inputs, each the name of a score.
        reported: results of the metrics that mean something for this task.
        model_finds_padding: whether the model itself looks for the padding token in its input.
        by_character: whether a document may be cut to hold out evaluation text.
    """

    name: str
    auto_class: type
    pipeline_tag: str
    encode: Callable[[Dataset, Dataset | None, PreTrainedTokenizerBase, DataArguments, int], Encoded]
    collator: Callable[[PreTrainedTokenizerBase, DataArguments], Callable[[list[Batch]], Batch]]
    count_targets: Callable[[Tensor], int]
    score: Callable[[Tensor, Batch], Scores]
    reported: tuple[str, ...]
    metrics: dict[str, dict[str, str]] = field(
        default_factory=lambda: {"perplexity": _PERPLEXITY, "accuracy": _ACCURACY}
    )
    model_finds_padding: bool = False
    by_character: bool = True


def find_task(name: str) -> Task:
    """The entry of a task.

    Raises:
        FocusConfigError: there is none.
    """
    if name not in TASKS:
        raise FocusConfigError(bad_value("task", name, "one of " + ", ".join(TASKS)))
    return TASKS[name]


def _encode_blocks(
    make_shape: Callable[[PreTrainedTokenizerBase, int], BlockShape],
) -> Callable[[Dataset, Dataset | None, PreTrainedTokenizerBase, DataArguments, int], Encoded]:
    def encode(
        train: Dataset, evaluation: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: DataArguments, size: int
    ) -> Encoded:
        shape = make_shape(tokenizer, size)

        def blocks(rows: Dataset, argument: str) -> Dataset:
            column = find_text_column(rows, args.text_column)
            return _numbered(pack(rows, tokenizer, column, shape, argument, args.cache_dir))

        return Encoded(
            blocks(train, "train_files" if args.train_files else "dataset"),
            None if evaluation is None else blocks(evaluation, "eval_files" if args.eval_files else "eval_split"),
        )

    return encode


def _encode_labelled(
    train: Dataset, evaluation: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: DataArguments, size: int
) -> Encoded:
    if args.label_column not in train.column_names:
        raise FocusDataError(bad_value("label_column", args.label_column, f"one of {train.column_names}"))
    kind = train.features[args.label_column]
    # A column of classes is stored as numbers, and carries their names
    names = list(getattr(kind, "names", None) or sorted(set(train[args.label_column]), key=_label_order))
    by_name = not hasattr(kind, "names")
    if len(names) < 2 or None in names:
        raise FocusDataError(
            bad_value("label_column", args.label_column, f"at least two labels, none of them empty; found {names}")
        )
    numbers = {label: number for number, label in enumerate(names)} if by_name else {i: i for i in range(len(names))}

    def examples(rows: Dataset, argument: str) -> Dataset:
        column = find_text_column(rows.remove_columns(args.label_column), args.text_column)
        pair = args.text_pair_column and find_text_column(rows, args.text_pair_column, "text_pair_column")
        if args.label_column not in rows.column_names or not set(rows[args.label_column]) <= set(numbers):
            raise FocusDataError(bad_value(argument, f"labels in column {args.label_column}", f"the labels {names}"))
        return _numbered(
            rows.map(
                _tokenize_labelled,
                batched=True,
                remove_columns=rows.column_names,
                fn_kwargs={
                    "tokenizer": tokenizer,
                    "columns": [column, pair] if pair else [column],
                    "label": args.label_column,
                    "numbers": numbers,
                    "size": size,
                    "code": hash_code(__file__),
                },
                desc="Tokenizing",
            )
        )

    id2label = {number: str(label) for number, label in enumerate(names)}
    return Encoded(
        examples(train, "train_files" if args.train_files else "dataset"),
        None if evaluation is None else examples(evaluation, "eval_files" if args.eval_files else "eval_split"),
        {
            "num_labels": len(names),
            "id2label": id2label,
            "label2id": {label: number for number, label in id2label.items()},
            "problem_type": "single_label_classification",
        },
    )


def _label_order(label: Any) -> tuple[str, Any]:
    return type(label).__name__, label


def _tokenize_labelled(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    label: str,
    numbers: dict[Any, int],
    size: int,
    code: str,
) -> dict[str, list[Any]]:
    texts = [[text or "" for text in batch[column]] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=size, verbose=False)
    return {**encoded, "labels": [numbers[value] for value in batch[label]]}


def _numbered(rows: Dataset) -> Dataset:
    return rows.add_column("example", list(range(len(rows))))


def _token_scores(logits: Tensor, labels: Tensor, num_bytes: Tensor) -> Scores:
    losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return {
        "nll": losses.double().sum(dim=1),
        "tokens": (labels != IGNORED).sum(dim=1),
        "bytes": num_bytes,
        "predictions": logits.argmax(dim=-1),
        "references": labels,
    }


def _score_causal(logits: Tensor, batch: Batch) -> Scores:
    return _token_scores(logits[:, :-1], batch["labels"][:, 1:], batch["num_bytes"])


def _score_masked(logits: Tensor, batch: Batch) -> Scores:
    return _token_scores(logits, batch["labels"], batch["num_bytes"])


def _score_classes(logits: Tensor, batch: Batch) -> Scores:
    labels = batch["labels"]
    return {
        "nll": cross_entropy(logits.float(), labels, reduction="none").double(),
        "tokens": torch.ones_like(labels),
        "bytes": torch.zeros_like(labels),
        "predictions": logits.argmax(dim=-1),
        "references": labels,
    }


def _masked_collator(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> MaskedCollator:
    if tokenizer.mask_token_id is None:
        raise FocusConfigError(
            bad_value("tokenizer", type(tokenizer).__name__, "one with a mask token, for masked-lm")
        )
    return MaskedCollator(tokenizer, mlm_probability=args.mlm_probability)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="causal-lm",
            auto_class=AutoModelForCausalLM,
            pipeline_tag="text-generation",
            encode=_encode_blocks(causal_shape),
            collator=lambda tokenizer, args: CausalCollator(tokenizer),
            count_targets=lambda labels: int((labels[:, 1:] != IGNORED).sum()),
            score=_score_causal,
            reported=("loss", "perplexity", "bits_per_byte", "accuracy"),
        ),
        Task(
            name="masked-lm",
            auto_class=AutoModelForMaskedLM,
            pipeline_tag="fill-mask",
            encode=_encode_blocks(masked_shape),
            collator=_masked_collator,
            count_targets=lambda labels: int((labels != IGNORED).sum()),
            score=_score_masked,
            reported=("loss", "perplexity", "accuracy"),
        ),
        Task(
            name="sequence-classification",
            auto_class=AutoModelForSequenceClassification,
            pipeline_tag="text-classification",
            encode=_encode_labelled,
            collator=lambda tokenizer, args: ClassificationCollator(tokenizer),
            count_targets=lambda labels: labels.shape[0],
            score=_score_classes,
            reported=("loss", "accuracy"),
            model_finds_padding=True,
            by_character=False,
        ),
    )
}
