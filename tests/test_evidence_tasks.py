"""Every generator of the evidence against the definition of its task."""

import pytest
import torch

from hf_focus.errors import FocusConfigError
from hf_focus.evidence_tasks import TASKS, find_task
from hf_focus.evidence_types import IGNORED, Batch


def batch(name: str, size: int = 16, seed: int = 0, **settings: object) -> Batch:
    return find_task(name).batch(size, torch.Generator().manual_seed(seed), settings)


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_examples_of_the_declared_sizes(name: str) -> None:
    task = TASKS[name]
    first, again, other = (batch(name, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.input_ids.shape == first.labels.shape == first.groups.shape == (16, task.length(**task.settings))
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


@pytest.mark.parametrize("joint", [False, True])
def test_k_step_answers_are_iterates_of_the_table_in_context(joint: bool) -> None:
    elements, steps, queries = 5, 4, 6
    found = batch("k-step", elements=elements, steps=steps, queries=queries, joint=joint)
    seen = set()
    for ids, labels, groups in zip(found.input_ids, found.labels, found.groups, strict=True):
        pairs = ids[:elements] - elements
        table = {int(p) // elements: int(p) % elements for p in pairs}
        assert sorted(table) == sorted(table.values()) == list(range(elements))
        for place in (labels != IGNORED).nonzero()[:, 0].tolist():
            first = elements + elements**2
            if joint:
                k, x = divmod(int(ids[place]) - first, elements)
                k += 1
            else:
                k, x = int(ids[place - 1]) - first + 1, int(ids[place])
            assert groups[place] == k
            seen.add(k)
            for _ in range(k):
                x = table[x]
            assert labels[place] == x
    assert seen == {1, 2, 3, 4}
