"""Every generator of the evidence against the definition of its task."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from hf_focus.errors import FocusConfigError, FocusDataError
from hf_focus.evidence_spans import span_counts, span_scores, spans_of
from hf_focus.evidence_tasks import TASKS, find_task
from hf_focus.evidence_tasks_hierarchy import _expression
from hf_focus.evidence_types import IGNORED, Batch


def batch(name: str, size: int = 16, seed: int = 0, **settings: object) -> Batch:
    return find_task(name).batch(size, torch.Generator().manual_seed(seed), settings)


def assert_share(found: torch.Tensor, share: float) -> None:
    """The share of True is `share`, within what 5 standard errors allow."""
    assert len(found) > 1000
    assert abs(found.double().mean().item() - share) < 5 * (share * (1 - share) / len(found)) ** 0.5


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_examples_of_the_declared_sizes(name: str) -> None:
    task = TASKS[name]
    first, again, other = (batch(name, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.input_ids.shape[:2] == first.labels.shape == first.groups.shape
    assert first.input_ids.shape[2:] == ((task.symbols,) if task.symbols > 1 else ())
    # Some draw how long a batch is, some batches are fewer and longer examples
    longest = task.length(**task.settings)
    size, length = first.labels.shape
    as_many = "long_share" in task.settings and size * length == 16 * longest
    assert (size, length) == (16, longest) or as_many or (task.settings.get("vary") and length < longest)
    assert first.input_ids.min() >= 0
    assert first.input_ids.max() < task.vocabulary(**task.settings)
    asked = first.labels != IGNORED
    assert asked.any(dim=1).all()
    assert first.labels[asked].max() < task.vocabulary(**task.settings)
    assert first.groups[asked].min() >= 0


@pytest.mark.parametrize("name", TASKS)
def test_settings_of_the_tests_exist(name: str) -> None:
    for changes in TASKS[name].tests.values():
        TASKS[name].with_settings(changes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(FocusConfigError, match="k-step"):
        find_task("k-leap")
    with pytest.raises(FocusConfigError, match="elements"):
        find_task("k-step").with_settings({"element": 8})


def test_k_step_answers_are_iterates_of_the_table_in_context() -> None:
    elements, steps, queries = 5, 4, 6
    found = batch("k-step", elements=elements, steps=steps, queries=queries)
    seen = set()
    for ids, labels, groups in zip(
        found.input_ids.tolist(), found.labels.tolist(), found.groups.tolist(), strict=True
    ):
        table = {x: y - elements for x, y in ids[:elements]}
        assert sorted(table) == sorted(table.values()) == list(range(elements))
        assert labels[:elements] == [IGNORED] * elements
        for (x, asked), label, k in zip(ids[elements:], labels[elements:], groups[elements:], strict=True):
            assert k == asked - 2 * elements + 1
            seen.add(k)
            for _ in range(k):
                x = table[x]
            assert label == x
    assert seen == {1, 2, 3, 4}


def test_recall_asks_every_key_once_for_its_value_at_places_two_apart() -> None:
    pairs = 5
    found = batch("recall", pairs=pairs, length=48, vocabulary=64)
    for ids, labels, groups in zip(found.input_ids, found.labels, found.groups, strict=True):
        keys, values = ids[: 2 * pairs : 2].tolist(), ids[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < 32 <= value for key, value in zip(keys, values, strict=True))
        places = (labels != IGNORED).nonzero()[:, 0].tolist()
        assert sorted(ids[places].tolist()) == sorted(keys)
        for place in places:
            assert place >= 2 * pairs
            assert place % 2 == 0
            number = keys.index(int(ids[place]))
            assert labels[place] == values[number]
            distance = place - (2 * number + 1)
            assert groups[place] <= distance < 2 * groups[place]


def test_recall_asks_sooner_rather_than_later() -> None:
    """p ∝ i^(a − 1) with a = 0.01: of all questions the first place gets almost its share."""
    found = batch("recall", size=4000, pairs=1, length=22, vocabulary=64)
    counts = (found.labels != IGNORED).sum(dim=0)[2::2].float()
    wanted = torch.arange(1, 11).float() ** (0.01 - 1)
    torch.testing.assert_close(counts / 4000, wanted / wanted.sum(), atol=0.03, rtol=0)


def test_passkey_hides_the_number_once_and_asks_for_it_at_the_end() -> None:
    found = batch("passkey", length=64, digits=3)
    for ids, labels in zip(found.input_ids, found.labels, strict=True):
        place = ids.tolist().index(10)
        number = ids[place + 1 : place + 4]
        assert (number < 10).all()
        assert ids[61] == 11
        assert torch.equal(labels[61:], number)
        assert torch.equal(ids[62:], number[:2])
        rest = torch.cat([ids[:place], ids[place + 4 : 61]])
        assert (rest >= 12).all()


@pytest.mark.parametrize("items", [2, 7])
def test_max_retrieval_has_one_item_above_all_others(items: int) -> None:
    found = batch("max-retrieval", items=items, vary=False)
    for ids, label in zip(found.input_ids, found.labels[:, -1], strict=True):
        levels, kinds = (ids[:-1] - 10) // 10, (ids[:-1] - 10) % 10
        assert (levels == levels.max()).sum() == 1
        assert levels.max() < 64
        assert label == kinds[levels.argmax()]
    assert (found.labels[:, :-1] == IGNORED).all()


def test_dyck_words_are_well_formed_and_groups_are_distances() -> None:
    found = batch("dyck", size=8, length=100)
    both = torch.cat([found.input_ids, torch.where(found.labels[:, -1:] == IGNORED, 0, found.labels[:, -1:])], dim=1)
    depths = set()
    for ids, labels, groups in zip(both.tolist(), found.labels.tolist(), found.groups.tolist(), strict=True):
        stack: list[tuple[int, int]] = []
        for place, token in enumerate(ids):
            if place and token >= 4:
                assert labels[place - 1] == token
                kind, opened = stack.pop()
                assert token == 4 + kind
                distance = place - opened
                assert groups[place - 1] == (0 if distance <= 8 else 8 if distance <= 24 else 24)
            else:
                assert place == 0 or labels[place - 1] == IGNORED
                stack.append((token, place))
            depths.add(len(stack))
    assert depths == set(range(6))


def test_dyck_words_are_a_walk_between_no_depth_and_the_greatest() -> None:
    ids = batch("dyck", size=2000, length=101).input_ids
    depths = torch.where(ids < 4, 1, -1).cumsum(dim=1)
    before, opens = depths[:, :-1], ids[:, 1:] < 4
    for depth in range(1, 5):
        assert_share(opens[before == depth], 0.5)
    assert opens[before == 0].all()
    assert not opens[before == 5].any()
    # The walk's stationary shares: 1/10 at either end and 1/5 between, twice that where the parity allows it
    late = depths[:, 100]
    for depth, share in ((1, 0.4), (3, 0.4), (5, 0.2)):
        assert_share(late == depth, share)
    for kind in range(4):
        assert_share(ids[ids < 4] == kind, 0.25)


def test_list_ops_are_drawn_as_in_long_range_arena() -> None:
    drawn = Random(0)
    written = [_expression(drawn, 1, 4, 5)[0] for _ in range(3000)]
    tokens = torch.tensor([token for expression in written for token in expression])
    for digit in range(10):
        assert_share(tokens[tokens < 10] == digit, 0.1)
    for operator in range(10, 14):
        assert_share(tokens[(tokens >= 10) & (tokens < 14)] == operator, 0.25)
    sizes, nested = [], []
    for expression in written:
        open_lists: list[int] = []
        for token in expression:
            if token == 14:
                sizes.append(open_lists.pop())
                continue
            if open_lists:
                open_lists[-1] += 1
                if len(open_lists) < 4:
                    nested.append(token >= 10)
            if token >= 10:
                open_lists.append(0)
    # A place that may hold a list holds one with probability ¼, and a list has 2 to 5 arguments
    assert_share(torch.tensor(nested), 0.25)
    assert set(sizes) == {2, 3, 4, 5}
    for size in range(2, 6):
        assert_share(torch.tensor(sizes) == size, 0.25)


def test_list_ops_values_are_right() -> None:
    import numpy as np

    functions = [min, max, lambda v: int(np.median(v)), lambda v: sum(v) % 10]
    found = batch("listops", size=40)

    def value(tokens: list[int]) -> tuple[int, int]:
        token = tokens.pop(0)
        if token < 10:
            return token, 0
        values, depths = [], []
        while tokens[0] != 14:
            one, depth = value(tokens)
            values.append(one)
            depths.append(depth)
        tokens.pop(0)
        assert 2 <= len(values) <= 5
        return functions[token - 10](values), 1 + max(depths)

    used = set()
    for ids, labels, groups in zip(found.input_ids, found.labels, found.groups, strict=True):
        tokens = ids[ids != 15].tolist()
        used |= set(tokens)
        assert 16 <= len(tokens) <= 64
        assert (labels[-1].item(), groups[-1].item()) == value(tokens)
        assert not tokens
        assert (labels[:-1] == IGNORED).all()
    assert used == set(range(15))


@pytest.mark.parametrize(
    ("name", "hidden", "values", "asked"),
    [
        ("needle", 1, 1, 1),
        ("multi-key needles", 4, 1, 1),
        ("multi-value needles", 2, 2, 1),
        ("multi-query needles", 4, 1, 2),
    ],
)
def test_needles_are_asked_for_by_key(name: str, hidden: int, values: int, asked: int) -> None:
    found = batch(name)
    for ids, labels in zip(found.input_ids.tolist(), found.labels.tolist(), strict=True):
        needles: dict[int, list[int]] = {}
        for place, token in enumerate(ids):
            if token == 42:
                needles.setdefault(ids[place + 1], []).extend(ids[place + 2 : place + 4])
        assert len(needles) == hidden
        assert all(len(numbers) == 2 * values for numbers in needles.values())
        questions = [place for place, token in enumerate(ids) if token == 43]
        assert len(questions) == asked
        for place in questions:
            assert labels[place + 1 : place + 1 + 2 * values] == needles[ids[place + 1]]
        assert sum(label != IGNORED for label in labels) == 2 * values * asked


def test_entity_spans_are_whole_names_of_the_list() -> None:
    found = batch("entity spans", size=32)
    mentioned = broken = 0
    for ids, labels in zip(found.input_ids.tolist(), found.labels.tolist(), strict=True):
        head = sum(label == IGNORED for label in labels)
        entries = [ids[place : place + 5] for place in range(0, head, 5)]
        names = {(kind, *[word for word in words if word]) for kind, *words in entries}
        for kind, first, last in spans_of(labels[head:]):
            assert (kind, *ids[head + first : head + last + 1]) in names
            mentioned += 1
        words = [name[1:] for name in names]
        starts = [name[:-1] for name in words]
        for place in range(head, len(ids) - 4):
            broken += labels[place] == 0 and any(tuple(ids[place : place + len(s)]) == s for s in starts if len(s) > 1)
    assert mentioned > 50
    assert broken > 20


def test_source_spans_are_those_of_tokenize() -> None:
    found = batch("source spans", size=64)
    text = ["".join(map(chr, ids)) for ids in found.input_ids.tolist()]
    seen = {1: 0, 2: 0}
    for source, labels in zip(text, found.labels.tolist(), strict=True):
        for kind, first, last in spans_of(labels):
            # A window may cut a span at either end
            if first > 0 and last < len(source) - 1 and labels[first] % 2:
                seen[kind] += 1
                span = source[first : last + 1]
                assert span.startswith("#") if kind == 2 else span[-1] in "'\"", span
                assert kind == 1 or "\n" not in span
    assert min(seen.values()) > 3


def test_text_asks_for_the_next_byte_of_other_files() -> None:
    found = batch("text", megabytes=0.2)
    assert torch.equal(found.input_ids[:, 1:], found.labels[:, :-1])
    held_out = batch("text", megabytes=0.2, part="held_out")
    assert not torch.equal(found.input_ids, held_out.input_ids)
    assert found.groups[0, :4].tolist() == [1, 2, 2, 4]


def test_spans_and_their_scores() -> None:
    right = [0, 1, 2, 0, 3, 4, 4, 0, 1]
    assert spans_of(right) == [(1, 1, 2), (2, 4, 6), (1, 8, 8)]
    assert spans_of([2, 2, 1, 1]) == [(1, 0, 1), (1, 2, 2), (1, 3, 3)]
    assert span_scores(span_counts(right, right)) == {"f1": 1.0, "boundary_errors_per_span": 0.0}
    # One right, one a token short, one missed
    found = span_scores(span_counts([0, 1, 2, 0, 3, 4, 0, 0, 0], right))
    assert found["f1"] == pytest.approx(2 / 5)
    assert found["boundary_errors_per_span"] == pytest.approx((1 + 2) / 3)
    assert span_scores(span_counts([0] * 9, right))["boundary_errors_per_span"] == 2


def test_a_share_of_the_long_text_is_of_the_longest_windows() -> None:
    always, never = (batch("long text", megabytes=0.2, long_share=share) for share in (1.0, 0.0))
    assert always.input_ids.shape == (2, 8192)
    assert never.input_ids.shape == (16, 1024)
    assert torch.equal(always.labels[:, :-1], always.input_ids[:, 1:])


def test_text_of_any_file(tmp_path: Path) -> None:
    rows = [{"id": n, "body": f"{n:04} " * 20} for n in range(100)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(path), "text_column": "body", "length": 64}
    found, held_out = (batch("text", part=part, **settings) for part in ("train", "held_out"))
    numbers = [
        {
            int(bytes(ids)[at : at + 4])
            for ids in ids_of.tolist()
            for at in range(60)
            if bytes(ids)[at : at + 4].isdigit()
        }
        for ids_of in (found.input_ids, held_out.input_ids)
    ]
    assert numbers[0]
    assert numbers[1]
    assert not numbers[0] & numbers[1]
    with pytest.raises(FocusDataError, match="text_column"):
        batch("text", **{**settings, "text_column": "title"})
    with pytest.raises(FocusDataError, match="more than"):
        batch("text", **{**settings, "length": 10**5})
    with pytest.raises(FocusDataError, match="existing file"):
        batch("text", dataset="nothing.txt")
