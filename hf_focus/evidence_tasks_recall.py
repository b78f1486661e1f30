"""Tasks of finding one thing in a long context: associative recall, passkey, the item of highest priority."""

import torch
from torch import Generator

from .evidence_types import AMONG_MORE, FAR_AND_SHORT, IGNORED, LONG_SPANS, Batch, Task


def associative_recall(
    size: int, generator: Generator, *, length: int = 64, pairs: int = 8, vocabulary: int = 64, power: float = 0.01
) -> Batch:
    """Multi-query associative recall (Zoology, 2312.04927): keys and values first, then every key once more.

    The first half of the vocabulary, without 0, are keys, the second half values. Where the keys are asked follows
    Zoology: places two apart, drawn without replacement with probability ∝ power·i^(power − 1). Everything else is
    random tokens. Groups: distance from a pair's value to the question, rounded down to a power of two.
    """
    context = 2 * pairs
    places = (length - context) // 2
    half = vocabulary // 2
    keys = 1 + torch.rand(size, half - 1, generator=generator).argsort(dim=1)[:, :pairs]
    values = half + torch.rand(size, vocabulary - half, generator=generator).argsort(dim=1)[:, :pairs]
    weight = power * torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(weight.expand(size, -1), pairs, generator=generator)
    asked = context + 2 * gaps
    ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    ids[:, :context] = torch.stack([keys, values], dim=-1).flatten(1)
    ids.scatter_(1, asked, keys)
    distance = asked - (2 * torch.arange(pairs) + 1)
    return Batch(ids, _at(asked, values, length), _at(asked, _power_of_two(distance), length))


def passkey(size: int, generator: Generator, *, length: int = 128, digits: int = 5, words: int = 24) -> Batch:
    """Passkey retrieval (2305.16300): a number once within text that repeats itself, asked for at the end.

    Tokens: ten digits, the mark before the number, the question, and `words` of the repeated text, which begins
    anywhere. The digits are answered one by one, each after the right ones before it. Groups: tenths of the context
    that the number lies behind.
    """
    mark, question, first_word = 10, 11, 12
    body = length - digits
    start = torch.randint(0, words, (size, 1), generator=generator)
    ids = first_word + (start + torch.arange(length)) % words
    number = torch.randint(0, 10, (size, digits), generator=generator)
    place = torch.randint(0, body - digits - 1, (size, 1), generator=generator)
    ids.scatter_(1, place, mark)
    ids.scatter_(1, place + 1 + torch.arange(digits), number)
    ids[:, body] = question
    ids[:, body + 1 :] = number[:, :-1]
    labels = torch.full_like(ids, IGNORED)
    labels[:, body:] = number
    groups = torch.full_like(ids, IGNORED)
    groups[:, body:] = 10 * place // body
    return Batch(ids, labels, groups)


def max_retrieval(
    size: int, generator: Generator, *, items: int = 16, vary: bool = True, levels: int = 64, classes: int = 10
) -> Batch:
    """The class of the item of highest priority (2410.01104, with priorities in levels): a token is (priority, class).

    One item is above all others; a last token asks. The order means nothing. Groups: the number of items.

    Args:
        items: n, or the most of them.
        vary: draw the number of items of a batch, from 2.
    """
    if vary:
        items = int(torch.randint(2, items + 1, (), generator=generator))
    level = torch.randint(0, levels - 1, (size, items), generator=generator)
    kind = torch.randint(0, classes, (size, items), generator=generator)
    winner = torch.randint(0, items, (size, 1), generator=generator)
    others = level.scatter(1, winner, -1).amax(dim=1, keepdim=True)
    above = torch.rand(size, 1, generator=generator) * (levels - 1 - others)
    level.scatter_(1, winner, others + 1 + above.long())
    tokens = classes + level * classes + kind
    ids = torch.cat([tokens, torch.full((size, 1), classes * (levels + 1))], dim=1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = kind.gather(1, winner)[:, 0]
    return Batch(ids, labels, torch.full_like(ids, items))


def _at(places: torch.Tensor, values: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length) with `values` (B, n) at `places` (B, n) and −100 elsewhere."""
    return torch.full((places.shape[0], length), IGNORED).scatter_(1, places, values)


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return 2 ** x.clamp_min(1).log2().floor().long()


def _longer(length: int) -> dict[str, dict[str, int]]:
    return {f"{times} L": {"length": times * length} for times in (2, 4, 8)}


TASKS = [
    Task(
        name="recall",
        claim=1,
        title="Multi-query associative recall (Zoology, 2312.04927)",
        group="distance (at least)",
        make=associative_recall,
        vocabulary=lambda vocabulary, **_: vocabulary,
        length=lambda length, **_: length,
        settings={"length": 64, "pairs": 8, "vocabulary": 64, "power": 0.01},
        tests={**_longer(64), "4 pairs": {"pairs": 4}, "16 pairs": {"pairs": 16}},
        focus=lambda **_: FAR_AND_SHORT,
    ),
    Task(
        name="passkey",
        claim=1,
        title="Passkey retrieval (2305.16300)",
        group="tenths of the context before it",
        make=passkey,
        vocabulary=lambda words, **_: 12 + words,
        length=lambda length, **_: length,
        settings={"length": 64, "digits": 5, "words": 24},
        tests=_longer(64),
        focus=lambda **_: {**FAR_AND_SHORT, **AMONG_MORE},
    ),
    Task(
        name="max-retrieval",
        claim=2,
        title="Max-retrieval (2410.01104): the class of the item of highest priority, no order",
        group="items",
        make=max_retrieval,
        vocabulary=lambda levels, classes, **_: classes * (levels + 1) + 1,
        length=lambda items, **_: items + 1,
        settings={"items": 16, "vary": True, "levels": 64, "classes": 10},
        tests={str(n): {"items": n, "vary": False} for n in (16, 64, 256, 1024, 4096)},
        # As long as the longest test: a span that cannot reach the items could only lose
        focus=lambda **_: {**LONG_SPANS, "max_span": 4097, "ramp": 32, "exponent_start": 1.25, **AMONG_MORE},
        ordered=False,
        spread=True,
    ),
]
