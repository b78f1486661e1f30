"""Exact match and F1 of extracted answers, as SQuAD defines them: an `evaluate` module."""

import re
import string
from collections import Counter

import datasets
import evaluate

DESCRIPTION = "Share of answers that are right to the letter, and mean F1 of their words, best over the references."
INPUTS = """
Args:
    predictions: the best answer in each window of a passage.
    references: all right answers of its question; empty if it has none.
    scores: of the predictions; the window with the highest answers.
    none_scores: of there being no answer. Used only where some question has none.
    questions: number of the question.
Returns:
    exact_match, f1: from 0 to 1.
"""
CITATION = ""


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus space."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the words two normalized answers share."""
    ours, theirs = prediction.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


class Answers(evaluate.Metric):
    """One answer a question, chosen among the windows of its passage."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                    "scores": datasets.Value("float64"),
                    "none_scores": datasets.Value("float64"),
                    "questions": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        scores: list[float],
        none_scores: list[float],
        questions: list[int],
    ) -> dict[str, float]:
        may_have_none = not all(references)
        windows: dict[int, list[int]] = {}
        for row, question in enumerate(questions):
            windows.setdefault(question, []).append(row)
        exact, f1 = 0.0, 0.0
        for rows in windows.values():
            best = max(rows, key=lambda row: scores[row])
            # A window without the answer has none for sure: the question has none if every window says so
            none = min(none_scores[row] for row in rows)
            prediction = "" if may_have_none and none > scores[best] else normalize(predictions[best])
            right = [normalize(answer) for answer in references[best]] or [""]
            exact += float(prediction in right)
            f1 += max(word_f1(prediction, answer) for answer in right)
        return {"exact_match": exact / len(windows), "f1": f1 / len(windows)}
