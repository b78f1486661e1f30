"""k-step lookup: a chain of dependent look-ups, each of which needs the result of the one before."""

import torch
from torch import Generator

from .evidence_types import IGNORED, LONG_SPANS, Batch, Task


def k_step(size: int, generator: Generator, *, elements: int = 16, steps: int = 3, queries: int = 8) -> Batch:
    """A permutation f in context, then questions: fᵏ(x) = ?

    A position holds two symbols: (x, f(x)) for the pairs of f, in random order, and (x, k) for the questions. With a
    token of its own for every pair, most of the work would be to learn that the token for (3, 5) begins with 3.

    Args:
        elements: that f permutes; f has as many pairs.
        steps: largest k; k is drawn from 1 to `steps` for each question.
        queries: questions about one permutation.

    Returns:
        input_ids (size, elements + queries, 2). Groups are k.
    """
    table = torch.rand(size, elements, generator=generator).argsort(dim=1)
    order = torch.rand(size, elements, generator=generator).argsort(dim=1)
    pairs = torch.stack([order, elements + table.gather(1, order)], dim=-1)
    k = torch.randint(1, steps + 1, (size, queries), generator=generator)
    x = torch.randint(0, elements, (size, queries), generator=generator)
    answer = x
    for step in range(steps):
        answer = torch.where(step < k, table.gather(1, answer), answer)
    questions = torch.stack([x, 2 * elements + k - 1], dim=-1)
    nothing = torch.full_like(order, IGNORED)
    return Batch(
        input_ids=torch.cat([pairs, questions], dim=1),
        labels=torch.cat([nothing, answer], dim=1),
        groups=torch.cat([nothing, k], dim=1),
    )


TASKS = [
    Task(
        name="k-step",
        claim=4,
        title="k-step lookup: fᵏ(x) of a permutation f that is given in context (pointer chasing)",
        group="k",
        make=k_step,
        vocabulary=lambda elements, steps, **_: 2 * elements + steps,
        length=lambda elements, queries, **_: elements + queries,
        settings={"elements": 16, "steps": 3, "queries": 8},
        # A look-up an iteration, and one to spare; spans start at half, and reach every pair
        focus=lambda steps, **_: {**LONG_SPANS, "ramp": 8, "max_iterations": steps + 1},
        symbols=2,
    )
]
