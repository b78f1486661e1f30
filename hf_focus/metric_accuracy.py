"""Share of correct predictions: an `evaluate` module."""

import datasets
import evaluate

DESCRIPTION = "Share of predictions that equal their reference."
INPUTS = """
Args:
    predictions: predicted classes or tokens.
    references: the right ones.
Returns:
    accuracy: from 0 to 1.
"""
CITATION = ""


class Accuracy(evaluate.Metric):
    """Accuracy over everything that was added."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        correct = sum(int(a == b) for a, b in zip(predictions, references, strict=True))
        return {"accuracy": correct / len(references)}
