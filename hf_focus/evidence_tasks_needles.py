"""Tasks of precise identification: needles among needles (RULER), and spans of entities as token classification."""

import io
import tokenize
from functools import lru_cache

import torch
from torch import Generator, Tensor

from .evidence_spans import batch_span_counts
from .evidence_types import AMONG_MORE, FAR_AND_SHORT, IGNORED, SHORT_SPANS, Batch, Task
from .stdlib_text import is_held_out, stdlib_files

# Kinds of tokens of Python source that are spans to find in real text
SPAN_KINDS = {tokenize.STRING: 1, tokenize.COMMENT: 2}


def needles(
    size: int,
    generator: Generator,
    *,
    length: int = 128,
    hidden: int = 4,
    values: int = 1,
    asked: int = 1,
    keys: int = 32,
    digits: int = 2,
    words: int = 32,
) -> Batch:
    """Needles in a haystack, in RULER's variants (2404.06654): single (`hidden` 1), multi-key (`hidden` > 1),
    multi-value (`values` > 1: all values of the key, in order) and multi-query (`asked` > 1 keys).

    A needle is a mark, a key and a number of `digits` digits; the haystack is random words. At the end come questions,
    each a mark and a key, then its numbers, digit by digit after the right ones before. Groups: tenths of the haystack
    that the first needle of the key lies behind.
    """
    mark, question, first_word = keys + 10, keys + 11, keys + 12
    needle, count = 2 + digits, hidden * values
    answer = 2 + values * digits
    haystack = length - asked * answer
    slots = haystack // needle
    ids = torch.randint(first_word, first_word + words, (size, length), generator=generator)
    key = torch.rand(size, keys, generator=generator).argsort(dim=1)[:, :hidden]
    number = torch.randint(keys, keys + 10, (size, hidden, values, digits), generator=generator)
    # In slots, so that needles do not overlap; sorted within a key, so that "in order" is the order of the text
    slot = torch.rand(size, slots, generator=generator).argsort(dim=1)[:, :count]
    slot = slot.view(size, hidden, values).sort(dim=2).values
    front = torch.stack([torch.full_like(slot, mark), key[..., None].expand_as(slot)], dim=-1)
    tokens = torch.cat([front, number], dim=-1).flatten(1)
    places = (needle * slot[..., None] + torch.arange(needle)).flatten(1)
    ids.scatter_(1, places, tokens)
    labels = torch.full_like(ids, IGNORED)
    groups = torch.full_like(ids, IGNORED)
    for turn in range(asked):
        # The needles are in random places: the first keys are as good as any
        start = haystack + turn * answer
        ids[:, start], ids[:, start + 1] = question, key[:, turn]
        numbers = number[:, turn].flatten(1)
        ids[:, start + 2 : start + answer] = numbers
        labels[:, start + 1 : start + answer - 1] = numbers
        groups[:, start + 1 : start + answer - 1] = 10 * needle * slot[:, turn, :1] // haystack
    return Batch(ids, labels, groups)


def entity_spans(
    size: int,
    generator: Generator,
    *,
    length: int = 128,
    names: int = 4,
    longest: int = 4,
    words: int = 32,
    mentions: int = 6,
    num_labels: int = 5,
) -> Batch:
    """Spans of entities in synthetic text: a list of names at the start says which runs of words are entities.

    The list holds `names` entries: a mark of the kind (two kinds), then 2 to `longest` words, padded. The text after
    it is random words, with as many of the `mentions` as fit: of a name, or as often only of its beginning, without
    the last word, which is no span.
    Labels are BIO tags (0 outside, 1/2 and 3/4 begin and go on with a kind). Groups: length of the name, 0 outside.
    """
    kinds, first = 2, 3
    entry = longest + 1
    head = names * entry
    ids = torch.randint(first, first + words, (size, length), generator=generator)
    labels, groups = torch.zeros_like(ids), torch.zeros_like(ids)
    labels[:, :head] = IGNORED
    kind = torch.randint(0, kinds, (size, names), generator=generator)
    name_length = torch.randint(2, longest + 1, (size, names), generator=generator)
    name = torch.randint(first, first + words, (size, names, longest), generator=generator)
    unused = torch.arange(longest) >= name_length[..., None]
    listed = torch.cat([1 + kind[..., None], name.masked_fill(unused, 0)], dim=-1)
    ids[:, :head] = listed.flatten(1)
    slots = (length - head) // entry
    slot = torch.rand(size, slots, generator=generator).argsort(dim=1)[:, :mentions]
    which = torch.randint(0, names, slot.shape, generator=generator)
    broken = torch.rand(slot.shape, generator=generator) < 0.5
    rows = torch.arange(size)[:, None]
    # A word between any two mentions: the slot is longer than the longest name
    start = head + slot * entry
    for step in range(longest):
        place = start + step
        inside = step < name_length[rows, which] - broken.long()
        ids[rows, place] = torch.where(inside, name[rows, which, step], ids[rows, place])
        tag = 1 + 2 * kind[rows, which] + (step > 0)
        labels[rows, place] = torch.where(inside & ~broken, tag, labels[rows, place])
        groups[rows, place] = torch.where(inside & ~broken, name_length[rows, which], groups[rows, place])
    return Batch(ids, labels, groups)


def source_spans(
    size: int, generator: Generator, *, length: int = 256, part: str = "train", num_labels: int = 5, files: int = 200
) -> Batch:
    """Spans in real text: string literals and comments in Python's standard library, byte by byte, as `tokenize` has
    them. Whether a byte is inside a string can depend on a quote far before it.

    Args:
        part: `"train"`, or `"held_out"`: other files.
        files: how many are read.
    """
    text, tags = _tagged_source(part, files)
    start = torch.randint(0, len(text) - length, (size, 1), generator=generator)
    places = start + torch.arange(length)
    labels = tags[places].long()
    return Batch(text[places].long(), labels, (labels + 1) // 2)


@lru_cache
def _tagged_source(part: str, files: int) -> tuple[Tensor, Tensor]:
    """Bytes and BIO tags (N,) uint8 of some files one after the other."""
    text, tags, read = bytearray(), bytearray(), 0
    for name, source in stdlib_files():
        # Tests of tokenizers hold what no tokenizer takes
        if is_held_out(name) != (part == "held_out") or not source.isascii() or read == files:
            continue
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (tokenize.TokenError, SyntaxError):
            continue
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        found = bytearray(len(source))
        for token in tokens:
            if token.type in SPAN_KINDS:
                first, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                kind = SPAN_KINDS[token.type]
                found[first:end] = bytes([2 * kind - 1] + [2 * kind] * (end - first - 1))
        text += source.encode()
        tags += found
        read += 1
    return torch.frombuffer(text, dtype=torch.uint8), torch.frombuffer(tags, dtype=torch.uint8)


def _count_spans(predictions: Tensor, batch: Batch) -> dict[str, float]:
    return batch_span_counts(predictions, batch.labels)


def _needles(name: str, title: str, **settings: int) -> Task:
    hidden = settings.get("hidden", 4)
    defaults = {
        "length": 64, "hidden": 4, "values": 1, "asked": 1, "keys": 32, "digits": 2, "words": 32,
    }  # fmt: skip
    return Task(
        name=name,
        claim=3,
        title=f"{title} (RULER, 2404.06654)",
        group="tenths of the haystack before it",
        make=needles,
        vocabulary=lambda keys, words, **_: keys + 12 + words,
        length=lambda length, **_: length,
        settings={**defaults, **settings},
        tests={f"{times} L": {"length": 64 * times} for times in (2, 4, 8, 16, 32)},
        focus=lambda **_: {**FAR_AND_SHORT, **AMONG_MORE},
        spread=hidden == 1,
    )


TASKS = [
    _needles("needle", "A single needle", hidden=1),
    _needles("multi-key needles", "Multi-key needles"),
    _needles("multi-value needles", "Multi-value needles", hidden=2, values=2),
    _needles("multi-query needles", "Multi-query needles", asked=2),
    Task(
        name="entity spans",
        claim=3,
        title="Spans of entities that a list in the same text names",
        group="words of the name",
        make=entity_spans,
        vocabulary=lambda words, **_: 3 + words,
        length=lambda length, **_: length,
        settings={
            "length": 128, "names": 4, "longest": 4, "words": 32, "mentions": 6, "num_labels": 5,
        },
        # In full, a mean of both sides' words, which says nothing of their order, kept it from learning
        focus=lambda **_: {**SHORT_SPANS, "local_start": 0.3},
        encoder=True,
        measure=_count_spans,
    ),
    Task(
        name="source spans",
        claim=3,
        title="String literals and comments in the source of Python's standard library, as `tokenize` has them",
        group="kind (1 string, 2 comment)",
        make=source_spans,
        vocabulary=lambda **_: 256,
        length=lambda length, **_: length,
        settings={"length": 256, "part": "train", "num_labels": 5, "files": 200},
        tests={"held out": {"part": "held_out"}},
        focus=lambda **_: SHORT_SPANS,
        encoder=True,
        measure=_count_spans,
    ),
]  # fmt: skip
