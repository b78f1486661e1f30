"""Word error rate: an `evaluate` module."""

from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = "Words to insert, remove or replace to make predictions the references, a word of the references."
INPUTS = """
Args:
    predictions: transcripts; words are what whitespace separates.
    references: the right ones.
Returns:
    wer: 0 where all are equal; can be more than 1.
"""
CITATION = ""


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Fewest insertions, removals and replacements that make one sequence the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


class WordErrorRate(evaluate.Metric):
    """Errors over all transcripts, divided once."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [(ours.split(), theirs.split()) for ours, theirs in zip(predictions, references, strict=True)]
        words = sum(len(theirs) for _, theirs in pairs)
        return {"wer": sum(edit_distance(*pair) for pair in pairs) / words} if words else {}
