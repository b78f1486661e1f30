"""Precision, recall, F1 and boundaries of entities: an `evaluate` module."""

from collections.abc import Iterable
from typing import TypeVar

import datasets
import evaluate

DESCRIPTION = "An entity is right if its kind and all of its words are (CoNLL), over tags such as B-PER, I-PER and O."
INPUTS = """
Args:
    predictions: predicted tags, one list a sentence.
    references: the right ones.
Returns:
    precision, recall, f1: from 0 to 1. boundary_errors: wrong ends of a right entity, 0 to 2 in the mean, against the
    predicted one of its kind that overlaps it most; 2 where none does. Nothing where no tag begins with B- or I-.
"""
CITATION = ""
Kind = TypeVar("Kind", str, int)


def find_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Kind, first and behind-last word of the entities of one sentence. I- after another kind begins an entity too."""
    entities = set()
    kind, begin = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, tag_kind = tag.partition("-")
        goes_on = mark == "I" and tag_kind == kind and bool(kind)
        if kind and not goes_on:
            entities.add((kind, begin, place))
            kind = ""
        if mark in ("B", "I") and tag_kind and not goes_on:
            kind, begin = tag_kind, place
    return entities


def nearest(wanted: tuple[Kind, int, int], found: Iterable[tuple[Kind, int, int]]) -> tuple[Kind, int, int] | None:
    """Of spans (kind, first, behind last) the one of the kind of `wanted` that overlaps it most; None: none does."""
    kind, first, end = wanted
    overlaps = [(min(end, other[2]) - max(first, other[1]), other) for other in found if other[0] == kind]
    return max(((size, other) for size, other in overlaps if size > 0), default=(0, None))[1]


def wrong_ends(wanted: tuple[Kind, int, int], found: tuple[Kind, int, int] | None) -> int:
    """Of the two ends of a span those that another does not share; both where there is no other."""
    return 2 if found is None else (found[1] != wanted[1]) + (found[2] != wanted[2])


class Entities(evaluate.Metric):
    """Counts over all sentences, divided once."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        found = right = expected = errors = 0
        for predicted, reference in zip(predictions, references, strict=True):
            ours, theirs = find_entities(predicted), find_entities(reference)
            found, right, expected = found + len(ours), right + len(ours & theirs), expected + len(theirs)
            errors += sum(wrong_ends(entity, nearest(entity, ours)) for entity in theirs)
        if not found and not expected:
            return {}
        precision, recall = (right / count if count else 0.0 for count in (found, expected))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        boundaries = {"boundary_errors": errors / expected} if expected else {}
        return {"precision": precision, "recall": recall, "f1": f1, **boundaries}
