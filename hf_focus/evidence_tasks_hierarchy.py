"""Tasks of nested structure: Dyck languages and ListOps."""

from random import Random
from statistics import median_low

import torch
from torch import Generator

from .evidence_types import IGNORED, LONG_SPANS, SHORT_SPANS, Batch, Task

# Distances up to these, and beyond, are reported apart
NEAR, FAR = 8, 24
# ListOps, as in Long Range Arena: chance that a place which may hold a list holds one
LIST_SHARE = 0.25
OPERATORS = {
    "MIN": min,
    "MAX": max,
    # The generator of Long Range Arena takes int(median), which for an even number rounds the mean of two down
    "MED": lambda values: (median_low(values) + sorted(values)[len(values) // 2]) // 2,
    "SM": lambda values: sum(values) % 10,
}
_OPEN, _CLOSE, _PAD = 10, 14, 15


def dyck(size: int, generator: Generator, *, length: int = 64, kinds: int = 4, depth: int = 5) -> Batch:
    """Beginnings of words of Dyck-(kinds, depth) (Hewitt et al., 2010.07515): which bracket closes next?

    At depth 0 a bracket opens, at the greatest depth one closes, else each with probability ½; kinds are uniform.
    Asked at every token that a closing bracket follows. Groups: distance between the two brackets: 0 for up to 8,
    8 for above 8, 24 for above 24.
    """
    ids = torch.empty(size, length + 1, dtype=torch.long)
    groups = torch.zeros(size, length + 1, dtype=torch.long)
    kind_of = torch.zeros(size, depth + 1, dtype=torch.long)
    place_of = torch.zeros(size, depth + 1, dtype=torch.long)
    height = torch.zeros(size, dtype=torch.long)
    coins = torch.rand(size, length + 1, generator=generator)
    drawn = torch.randint(0, kinds, (size, length + 1), generator=generator)
    every = torch.arange(size)
    for place in range(length + 1):
        opens = (height == 0) | ((height < depth) & (coins[:, place] < 0.5))
        top_kind, top_place = kind_of[every, height], place_of[every, height]
        ids[:, place] = torch.where(opens, drawn[:, place], kinds + top_kind)
        distance = place - top_place
        groups[:, place] = (distance > NEAR) * NEAR + (distance > FAR) * (FAR - NEAR)
        height = torch.where(opens, height + 1, height - 1)
        written = height[opens]
        kind_of[every[opens], written] = drawn[opens, place]
        place_of[every[opens], written] = place
    labels = ids[:, 1:].masked_fill(ids[:, 1:] < kinds, IGNORED)
    return Batch(ids[:, :-1], labels, groups[:, 1:])


def list_ops(
    size: int, generator: Generator, *, least: int = 16, length: int = 64, arguments: int = 5, depth: int = 4
) -> Batch:
    """ListOps in the grammar of Long Range Arena (2011.04006): the value of a nested expression in prefix form.

    Tokens: ten digits, four operators each with its opening bracket, the closing bracket, and padding on the left.
    Groups: the depth of the expression.

    Args:
        least, length: fewest and most tokens of an expression.
        arguments: most of a list; at least 2.
        depth: greatest depth of nesting.
    """
    random = Random(int(torch.randint(0, 2**31, (), generator=generator)))
    rows, answers, depths = [], [], []
    while len(rows) < size:
        tokens, value, nested = _expression(random, 1, depth, arguments)
        if least <= len(tokens) <= length:
            rows.append([_PAD] * (length - len(tokens)) + tokens)
            answers.append(value)
            depths.append(nested)
    ids = torch.tensor(rows)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = torch.tensor(answers)
    return Batch(ids, labels, torch.tensor(depths)[:, None].expand(-1, length))


def _expression(random: Random, level: int, depth: int, arguments: int) -> tuple[list[int], int, int]:
    """Tokens, value and depth of one expression. The outermost one is a list: a digit alone is too short anyway."""
    if level > 1 and (level > depth or random.random() > LIST_SHARE):
        digit = random.randrange(10)
        return [digit], digit, 0
    parts = [_expression(random, level + 1, depth, arguments) for _ in range(random.randint(2, arguments))]
    number = random.randrange(len(OPERATORS))
    value = list(OPERATORS.values())[number]([part[1] for part in parts])
    tokens = [_OPEN + number, *(token for part in parts for token in part[0]), _CLOSE]
    return tokens, value, 1 + max(part[2] for part in parts)


TASKS = [
    Task(
        name="dyck",
        claim=4,
        title="Dyck-(4, 5): kind of the closing bracket, by distance (2010.07515)",
        group="distance (above)",
        make=dyck,
        vocabulary=lambda kinds, **_: 2 * kinds,
        length=lambda length, **_: length,
        settings={"length": 64, "kinds": 4, "depth": 5},
        tests={"2 L": {"length": 128}, "4 L": {"length": 256}},
        focus=lambda **_: LONG_SPANS,
    ),
    Task(
        name="listops",
        claim=4,
        title="ListOps in the grammar of Long Range Arena (2011.04006), short",
        group="depth",
        make=list_ops,
        vocabulary=lambda **_: _PAD + 1,
        length=lambda length, **_: length,
        settings={"least": 16, "length": 64, "arguments": 5, "depth": 4},
        tests={"2 L": {"least": 64, "length": 128}},
        focus=lambda **_: SHORT_SPANS,
    ),
]
