"""k-step lookup: a chain of dependent look-ups, each of which needs the result of the one before."""

import torch
from torch import Generator

from .evidence_types import IGNORED, Batch, Task


def k_step(
    size: int, generator: Generator, *, elements: int = 8, steps: int = 3, queries: int = 1, joint: bool = False
) -> Batch:
    """A permutation f in context, one token (x, f(x)) a pair in random order, then questions: fᵏ(x) = ?

    Args:
        elements: that f permutes; f has as many pairs.
        steps: largest k; k is drawn from 1 to `steps` for each question.
        queries: questions about one permutation.
        joint: a question is one token (k, x); else two, k and then x.

    Returns:
        Answers are asked at the last token of each question; groups are k.
    """
    table = torch.rand(size, elements, generator=generator).argsort(dim=1)
    order = torch.rand(size, elements, generator=generator).argsort(dim=1)
    pairs = elements + order * elements + table.gather(1, order)
    k = torch.randint(1, steps + 1, (size, queries), generator=generator)
    x = torch.randint(0, elements, (size, queries), generator=generator)
    answer = x
    for step in range(steps):
        answer = torch.where(step < k, table.gather(1, answer), answer)
    first = elements + elements**2
    asked = [first + (k - 1) * elements + x] if joint else [first + k - 1, x]
    questions = torch.stack(asked, dim=-1)
    nothing = torch.full_like(questions, IGNORED)
    labels = torch.cat([nothing[..., 1:], answer[..., None]], dim=-1)
    before = torch.full_like(pairs, IGNORED)
    return Batch(
        input_ids=torch.cat([pairs, questions.flatten(1)], dim=1),
        labels=torch.cat([before, labels.flatten(1)], dim=1),
        groups=torch.cat([before, k[..., None].expand_as(questions).flatten(1)], dim=1),
    )


def _vocabulary(elements: int, steps: int, queries: int, joint: bool) -> int:
    return elements + elements**2 + steps * (elements if joint else 1)


def _length(elements: int, steps: int, queries: int, joint: bool) -> int:
    return elements + queries * (1 if joint else 2)


TASKS = [
    Task(
        name="k-step",
        claim=4,
        title="k-step lookup: fᵏ(x) of a permutation f that is given in context (pointer chasing)",
        group="k",
        make=k_step,
        vocabulary=_vocabulary,
        length=_length,
        settings={"elements": 8, "steps": 3, "queries": 1, "joint": False},
        # A look-up an iteration, and one to spare
        focus=lambda steps, **_: {"max_span": 32, "ramp": 8, "max_iterations": steps + 1},
    )
]
