"""Precision, recall and F1 of entities: an `evaluate` module."""

import datasets
import evaluate

DESCRIPTION = "An entity is right if its kind and all of its words are (CoNLL), over tags such as B-PER, I-PER and O."
INPUTS = """
Args:
    predictions: predicted tags, one list a sentence.
    references: the right ones.
Returns:
    precision, recall, f1: from 0 to 1; nothing where no tag begins with B- or I-.
"""
CITATION = ""


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
        found = right = expected = 0
        for predicted, reference in zip(predictions, references, strict=True):
            ours, theirs = find_entities(predicted), find_entities(reference)
            found, right, expected = found + len(ours), right + len(ours & theirs), expected + len(theirs)
        if not found and not expected:
            return {}
        precision, recall = (right / count if count else 0.0 for count in (found, expected))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        return {"precision": precision, "recall": recall, "f1": f1}
