"""Spans in sequences of tags: exact F1 and errors of boundaries. Plain functions, for any model's predictions."""

from collections.abc import Sequence

from torch import Tensor

from .metric_entities import nearest, wrong_ends

# Tags: 0 outside; 2k − 1 begins a span of kind k ≥ 1, 2k goes on with it
OUTSIDE = 0
Span = tuple[int, int, int]


def spans_of(tags: Sequence[int]) -> list[Span]:
    """(kind, first, last) of every span in BIO tags. One that goes on without a beginning begins there."""
    spans: list[Span] = []
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        kind, begins = (tag + 1) // 2, tag % 2 == 1
        if not begins and spans and spans[-1][0] == kind and spans[-1][2] == place - 1:
            spans[-1] = (kind, spans[-1][1], place)
        else:
            spans.append((kind, place, place))
    return spans


def span_counts(predicted: Sequence[int], right: Sequence[int]) -> dict[str, float]:
    """What F1 and boundary errors are made from, of one sequence; sums over sequences are as good.

    Returns:
        spans_found, spans_right, spans_both (equal in kind, first and last); spans_touched: right spans that a found
        one of their kind overlaps; boundary_errors: wrong ends of these (0, 1 or 2 each), against the found span that
        overlaps most.
    """
    # Half open, as `nearest` has them
    found, wanted = ([(kind, first, last + 1) for kind, first, last in spans_of(tags)] for tags in (predicted, right))
    touched = errors = 0
    for span in wanted:
        best = nearest(span, found)
        if best is not None:
            touched += 1
            errors += wrong_ends(span, best)
    return {
        "spans_found": float(len(found)),
        "spans_right": float(len(wanted)),
        "spans_both": float(len(set(found) & set(wanted))),
        "spans_touched": float(touched),
        "boundary_errors": float(errors),
    }


def span_scores(counts: dict[str, float]) -> dict[str, float]:
    """`span_counts`, summed, as F1 and as boundary errors a right span.

    A right span that nothing overlaps has no boundaries and counts as two errors: to find less is no way to err less.
    """
    f1 = 2 * counts["spans_both"] / max(1.0, counts["spans_found"] + counts["spans_right"])
    missed = counts["spans_right"] - counts["spans_touched"]
    errors = (counts["boundary_errors"] + 2 * missed) / max(1.0, counts["spans_right"])
    return {"f1": f1, "boundary_errors_per_span": errors}


def batch_span_counts(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """`span_counts` summed over a batch: predictions and labels (B, T); places labelled −100 are left out."""
    total: dict[str, float] = {}
    for predicted, right in zip(predictions, labels, strict=True):
        asked = right >= 0
        for name, value in span_counts(predicted[asked].tolist(), right[asked].tolist()).items():
            total[name] = total.get(name, 0.0) + value
    return total
