"""Tasks with classes: one for a text, or one for each word of it."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from datasets.features import List
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from .arguments import DataArguments
from .collators import IGNORED, Batch
from .data import find_text_column
from .errors import FocusDataError, bad_value
from .task_types import (
    ACCURACY,
    PERPLEXITY,
    Encoded,
    Scores,
    Source,
    Task,
    check_column,
    check_fast,
    count_labels,
    encode_parts,
    encode_rows,
    score_labels,
)


def _number_labels(values: Any, names: Sequence[str] | None, argument: str, column: str) -> tuple[list, dict]:
    """The labels in order, and the number of each as it stands in the column."""
    # A column of classes is stored as numbers, and carries their names
    labels = sorted(set(values), key=lambda label: (type(label).__name__, label)) if names is None else list(names)
    if len(labels) < 2 or None in labels:
        accepted = f"at least two labels, none of them empty; found {labels}"
        raise FocusDataError(bad_value(argument, column, accepted))
    return labels, {label: i for i, label in enumerate(labels)} if names is None else {
        i: i for i in range(len(labels))
    }


def _check_labels(found: set[Any], numbers: dict[Any, int], labels: list[Any], argument: str, column: str) -> None:
    if not found <= set(numbers):
        raise FocusDataError(bad_value(argument, f"labels in column {column}", f"the labels {labels}"))


def _label_settings(labels: list[Any]) -> dict[str, Any]:
    id2label = {number: str(label) for number, label in enumerate(labels)}
    label2id = {label: number for number, label in id2label.items()}
    return {"num_labels": len(labels), "id2label": id2label, "label2id": label2id}


def _encode_texts(
    train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int
) -> Encoded:
    name = check_column(train, "label_column", args.label_column)
    names = getattr(train.features[name], "names", None)
    labels, numbers = _number_labels(train[name], names, "label_column", name)

    def examples(rows: Dataset, argument: str) -> Dataset:
        check_column(rows, "label_column", name)
        column = find_text_column(rows.remove_columns(name), args.text_column)
        pair = args.text_pair_column and find_text_column(rows, args.text_pair_column, "text_pair_column")
        _check_labels(set(rows[name]), numbers, labels, argument, name)
        return encode_rows(
            rows,
            _tokenize_texts,
            source,
            size,
            columns=[column, pair] if pair else [column],
            label=name,
            numbers=numbers,
        )

    settings = {**_label_settings(labels), "problem_type": "single_label_classification"}
    return Encoded(*encode_parts(train, evaluation, args, examples), settings)


def _tokenize_texts(
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


def _score_texts(outputs: Any, batch: Batch, source: Source) -> Scores:
    logits, labels = outputs.logits, batch["labels"]
    return {
        "nll": cross_entropy(logits.float(), labels, reduction="none").double(),
        "tokens": torch.ones_like(labels),
        "bytes": torch.zeros_like(labels),
        "predictions": logits.argmax(dim=-1),
        "references": labels,
    }


def _encode_words(
    train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int
) -> Encoded:
    check_fast(source, "token-classification")
    names = getattr(_tags_of(train, args).feature, "names", None)
    labels, numbers = _number_labels(_all_tags(train, args), names, "tags_column", args.tags_column)

    def examples(rows: Dataset, argument: str) -> Dataset:
        _tags_of(rows, args)
        _check_labels(set(_all_tags(rows, args)), numbers, labels, argument, args.tags_column)
        encoded = encode_rows(
            rows,
            _tokenize_words,
            source,
            size,
            columns=[args.tokens_column, args.tags_column],
            numbers=numbers,
            argument=argument,
        )
        if len(encoded) == 0:
            raise FocusDataError(bad_value(argument, f"{len(rows)} rows without a word", "rows that hold words"))
        return encoded

    return Encoded(*encode_parts(train, evaluation, args, examples), _label_settings(labels))


def _tags_of(rows: Dataset, args: DataArguments) -> List:
    """The type of the column of tags, if it and that of the words are lists."""
    for argument in ("tokens_column", "tags_column"):
        name = check_column(rows, argument, getattr(args, argument))
        if not isinstance(rows.features[name], List):
            accepted = f"a column of lists, one entry a word; this one holds {rows.features[name]}"
            raise FocusDataError(bad_value(argument, name, accepted))
    return rows.features[args.tags_column]


def _all_tags(rows: Dataset, args: DataArguments) -> list[Any]:
    return [
        tag
        for batch in rows.select_columns(args.tags_column).iter(1000)
        for tags in batch[args.tags_column]
        for tag in tags
    ]


def _tokenize_words(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    numbers: dict[Any, int],
    size: int,
    argument: str,
    code: str,
) -> dict[str, list[Any]]:
    """The first token of each word carries its tag, the others none."""
    pairs = [(words, tags) for words, tags in zip(*(batch[name] for name in columns), strict=True) if words]
    for words, tags in pairs:
        if len(words) != len(tags):
            accepted = f"as many tags as words in every row; {' '.join(words)[:40]!r} has {len(words)} words"
            raise FocusDataError(bad_value(argument, f"{len(tags)} tags", accepted))
    if not pairs:
        return {"input_ids": [], "labels": []}
    encoded = tokenizer(
        [words for words, _ in pairs], is_split_into_words=True, truncation=True, max_length=size, verbose=False
    )
    labels = []
    for i, (_, tags) in enumerate(pairs):
        places = encoded.word_ids(i)
        labels.append(
            [
                IGNORED if word is None or word == before else numbers[tags[word]]
                for before, word in zip([None, *places], places, strict=False)
            ]
        )
    return {**encoded, "labels": labels}


def _score_words(outputs: Any, batch: Batch, source: Source) -> Scores:
    scores = score_labels(outputs, batch, source)
    names = source.config.id2label
    counted = [row != IGNORED for row in batch["labels"]]
    for tags, numbers in (("predicted_tags", scores["predictions"]), ("tags", batch["labels"])):
        rows = zip(numbers, counted, strict=True)
        scores[tags] = [[names[number] for number in row[keep].tolist()] for row, keep in rows]
    return scores


SEQUENCE_CLASSIFICATION = Task(
    name="sequence-classification",
    auto_class=AutoModelForSequenceClassification,
    pipeline_tag="text-classification",
    encode=_encode_texts,
    collator=lambda source, args: DataCollatorWithPadding(source.tokenizer),
    count_targets=lambda batch: batch["labels"].shape[0],
    score=_score_texts,
    reported=("loss", "accuracy"),
    labels="label_column",
    model_finds_padding=True,
    by_character=False,
)
TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    auto_class=AutoModelForTokenClassification,
    pipeline_tag="token-classification",
    splits_words=True,
    encode=_encode_words,
    collator=lambda source, args: DataCollatorForTokenClassification(source.tokenizer),
    count_targets=count_labels,
    score=_score_words,
    reported=("loss", "accuracy", "precision", "recall", "f1", "boundary_errors"),
    metrics={
        "perplexity": PERPLEXITY,
        "accuracy": ACCURACY,
        "entities": {"predictions": "predicted_tags", "references": "tags"},
    },
    labels="tags_column",
    by_character=False,
)
