"""Question answering: the answer is a span of a passage, which long passages hold in one of several windows."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from .arguments import DataArguments
from .collators import Batch
from .errors import FocusConfigError, FocusDataError, bad_value
from .task_types import (
    PERPLEXITY,
    Encoded,
    Scores,
    Source,
    Task,
    check_column,
    check_fast,
    encode_parts,
    encode_rows,
)

# No answer is longer, in tokens
MAX_ANSWER = 30
# Of tokens that are not of the passage
OUTSIDE = -1
_OFFSETS = ("starts", "ends")
_TARGETS = ("start_positions", "end_positions")


def _encode(train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int) -> Encoded:
    check_fast(source, "question-answering")
    stride = size // 4 if args.doc_stride is None else args.doc_stride
    if stride >= size:
        raise FocusConfigError(bad_value("doc_stride", stride, f"less than the {size} tokens of an example"))
    columns = ("question_column", "context_column", "answers_column")

    def windows(rows: Dataset, argument: str) -> Dataset:
        names = [check_column(rows, column, getattr(args, column)) for column in columns]
        kind = rows.features[names[2]]
        if not isinstance(kind, dict) or not {"text", "answer_start"} <= set(kind):
            accepted = "a column of {'text': [...], 'answer_start': [...]}, empty lists where there is no answer"
            raise FocusDataError(bad_value("answers_column", names[2], accepted))
        return encode_rows(
            rows,
            _cut_windows,
            source,
            size,
            options={
                "with_indices": True,
            },
            columns=names,
            stride=stride,
            argument=argument,
        )

    return Encoded(*encode_parts(train, evaluation, args, windows))


def _cut_windows(
    batch: dict[str, list[Any]],
    numbers: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    size: int,
    stride: int,
    argument: str,
    code: str,
) -> dict[str, list[Any]]:
    """Windows of `size` tokens over each passage, the question in front of each.

    Returns:
        inputs of the model; `start_positions` and `end_positions`, tokens of the first answer, 0 where the window does
        not hold it; `question`, a number; `passage`, the window's text; `starts` and `ends`, the characters of it that
        a token covers; `answers`, all that are right.
    """
    questions, contexts, answers = (batch[name] for name in columns)
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"])
    room = size - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        accepted = f"more than {size - room + stride}: the longest question and {stride} shared tokens (doc_stride)"
        raise FocusConfigError(bad_value("block_size", size, accepted))
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=size,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    rows_of = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    added: dict[str, list[Any]] = {name: [] for name in (*_TARGETS, *_OFFSETS, "question", "passage", "answers")}
    for window, row in enumerate(rows_of):
        context, found = contexts[row], answers[row]
        places = [
            span if part == 1 and span[1] > span[0] else None
            for part, span in zip(encoded.sequence_ids(window), offsets[window], strict=True)
        ]
        covered = [span for span in places if span is not None]
        first, last = (covered[0][0], covered[-1][1]) if covered else (0, 0)
        start, end = _find_answer(places, context, found, argument)
        added["start_positions"].append(start)
        added["end_positions"].append(end)
        added["starts"].append([OUTSIDE if span is None else span[0] - first for span in places])
        added["ends"].append([OUTSIDE if span is None else span[1] - first for span in places])
        added["question"].append(numbers[row])
        added["passage"].append(context[first:last])
        added["answers"].append(list(found["text"]))
    return {**encoded, **added}


def _find_answer(
    places: list[tuple[int, int] | None], context: str, answer: dict[str, list[Any]], argument: str
) -> tuple[int, int]:
    """First and last token of the answer; (0, 0) if there is none, or not all of it is in this window."""
    if not answer["text"]:
        return 0, 0
    text, begin = answer["text"][0], answer["answer_start"][0]
    if context[begin : begin + len(text)] != text:
        accepted = f"answers that stand in the context at answer_start; {context[begin : begin + len(text)]!r} does"
        raise FocusDataError(bad_value(argument, f"answer {text!r}", accepted))
    end = begin + len(text)
    inside = [i for i, span in enumerate(places) if span is not None and span[0] < end and span[1] > begin]
    if not inside or places[inside[0]][0] > begin or places[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


@dataclass
class _WindowCollator:
    """Pads windows; strings stay lists."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[Batch]) -> Batch:
        inputs = [{n: e[n] for n in self.tokenizer.model_input_names if n in e} for e in examples]
        # On the right: positions count from the first token
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        for name in (*_TARGETS, "question"):
            batch[name] = torch.tensor([example[name] for example in examples])
        for name in _OFFSETS:
            rows = [torch.tensor(example[name]) for example in examples]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=OUTSIDE)
        return {**batch, **{name: [example[name] for example in examples] for name in ("passage", "answers")}}


def _score(outputs: Any, batch: Batch, source: Source) -> Scores:
    # No answer begins in padding: what is scored must not depend on the rest of the batch
    padding = batch["attention_mask"] == 0
    start, end = (
        logits.float().masked_fill(padding, -torch.inf) for logits in (outputs.start_logits, outputs.end_logits)
    )
    losses = [
        cross_entropy(logits, batch[name], reduction="none")
        for logits, name in zip((start, end), _TARGETS, strict=True)
    ]
    begins, scores = best_spans(start, end, batch["starts"] != OUTSIDE)
    texts = [
        passage[starts[first] : ends[last]]
        for passage, starts, ends, (first, last) in zip(
            batch["passage"], batch["starts"].tolist(), batch["ends"].tolist(), begins.tolist(), strict=True
        )
    ]
    ones = torch.ones_like(batch["question"])
    return {
        "nll": sum(losses).double() / 2,
        "tokens": ones,
        "bytes": torch.zeros_like(ones),
        "answer": texts,
        "score": scores.tolist(),
        "score_of_none": (start[:, 0] + end[:, 0]).tolist(),
        "question": batch["question"].tolist(),
        "answers": batch["answers"],
    }


def best_spans(start: torch.Tensor, end: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest span of at most `MAX_ANSWER` tokens.

    Args:
        start, end: logits (B, T).
        allowed: tokens that an answer may hold (B, T).

    Returns:
        first and last token (B, 2), and the sum of their logits (B,); -inf where nothing is allowed.
    """
    start, end = (logits.masked_fill(~allowed, -torch.inf) for logits in (start, end))
    length = start.shape[1]
    pairs = start[:, :, None] + end[:, None, :]
    band = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(MAX_ANSWER - 1)
    scores, places = pairs.masked_fill(~band, -torch.inf).flatten(1).max(dim=1)
    return torch.stack([places // length, places % length], dim=1), scores


QUESTION_ANSWERING = Task(
    name="question-answering",
    auto_class=AutoModelForQuestionAnswering,
    pipeline_tag="question-answering",
    encode=_encode,
    collator=lambda source, args: _WindowCollator(source.tokenizer),
    count_targets=lambda batch: len(batch["start_positions"]),
    score=_score,
    reported=("loss", "exact_match", "f1"),
    metrics={
        "perplexity": PERPLEXITY,
        "answers": {
            "predictions": "answer",
            "references": "answers",
            "scores": "score",
            "none_scores": "score_of_none",
            "questions": "question",
        },
    },
    targets=_TARGETS,
    by_character=False,
)
