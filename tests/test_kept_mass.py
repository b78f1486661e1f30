"""What corrections of a span keep of the attention, and that the refiner shortens spans where nothing is lost."""

from typing import Any

import pytest
import torch
from helpers import DIM, HEADS, KV_HEADS, assert_same_buffers, branch, branch_inputs, buffers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_focus import FocusConfig, focus_attention
from hf_focus.branch import FocusBranch
from hf_focus.iteration import soft_span_mask
from hf_focus.kept_mass import MOST_QUERIES, MOST_SCORES, kept_mass, sampled_queries
from hf_focus.observers import FocusRecord, observe

LENGTH = 12


def by_attention(problem: dict[str, Any], span: Tensor, shorter: Tensor, temperature: Tensor, rows: slice) -> Tensor:
    """The slow way: with one-hot values, the output of an iteration is its weights."""
    options = {name: x for name, x in problem.items() if name not in ("query", "key", "value")}
    readout = options.pop("readout_weights")
    iterations, length, num_keys = options["max_iterations"], problem["query"].shape[2], problem["key"].shape[2]
    whole, tau = problem["query"].new_ones(2, *problem["query"].shape[:3])
    whole[:, :, rows], tau[:, :, rows] = span, temperature
    summed = 0
    needed = torch.stack([readout[..., step:].sum(-1) for step in range(iterations)], -1)
    for step in range(iterations):
        only = torch.zeros_like(readout)
        only[..., step] = 1
        output = focus_attention(
            problem["query"], problem["key"], problem["value"], whole, temperature=tau, readout_weights=only,
            base_threshold=0.0, threshold_scale=0.0, backend="reference", **options,
        ).output  # fmt: skip
        summed = summed + output * needed[..., step, None]
    weights = (summed / needed.sum(-1, keepdim=True))[:, :, rows]
    distance = (torch.arange(length)[rows, None] + options["query_offset"] - torch.arange(num_keys)).abs()

    def mask(z: Tensor) -> Tensor:
        return soft_span_mask(distance, z[..., None], options["ramp"], options["max_span"])

    return torch.stack([(weights * mask(z) / mask(span).clamp_min(1e-9)).sum(-1) for z in shorter.unbind(-1)], -1)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    is_causal=st.booleans(),
    earlier=st.integers(0, 5),
    max_span=st.integers(1, 20),
    masked=st.sampled_from(["no", "bool", "additive"]),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    shared=st.booleans(),
    feedback=st.sampled_from(["normalized", "additive"]),
    anchored=st.booleans(),
    rotated=st.booleans(),
)
def test_it_is_what_attention_keeps(
    seed: int, is_causal: bool, earlier: int, max_span: int, masked: str, biased: bool, softcap: float | None,
    shared: bool, feedback: str, anchored: bool, rotated: bool,
) -> None:  # fmt: skip
    noise = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=noise, dtype=torch.float64)

    num_keys, rows = LENGTH + earlier, slice(1, LENGTH, 3)
    count = len(range(LENGTH)[rows])
    query, key = rand(2, HEADS, LENGTH, DIM) - 0.5, 4 * rand(2, KV_HEADS, num_keys, DIM)
    mask = rand(2, 1, LENGTH, num_keys) < 0.8
    mask |= torch.arange(num_keys) == torch.arange(LENGTH)[:, None] + earlier
    if masked == "additive":
        mask = torch.where(mask, rand(*mask.shape), torch.finfo(torch.float64).min)
    problem = {
        "query": query,
        "key": key,
        "value": torch.eye(num_keys, dtype=key.dtype).expand(2, KV_HEADS, -1, -1),
        "readout_weights": rand(2, HEADS, LENGTH, 3).softmax(-1),
        "feedback_matrix": rand(HEADS, num_keys, DIM) - 0.5,
        "mix": rand(HEADS),
        "gain": 0.5 + rand(HEADS),
        "rotary_pairs": "neighbours" if seed % 2 else "halves",
        "rotation": rand(2, 1, LENGTH, DIM) - 0.5 if rotated else None,
        "attention_mask": None if masked == "no" else mask,
        "position_bias": rand(1, HEADS, LENGTH, num_keys) if biased else None,
        "is_causal": is_causal,
        "scaling": 0.7,
        "softcap": softcap,
        "query_offset": earlier,
        "max_span": max_span,
        "ramp": 3,
        "max_iterations": 3,
        "feedback": feedback,
        "anchored": anchored,
    }
    heads = 1 if shared else HEADS
    span, temperature = max_span * rand(2, heads, count), 0.5 + rand(2, HEADS, count)
    shorter = span[..., None] * rand(2, heads, count, 4)
    found = kept_mass(**problem, span=span, shorter=shorter, temperature=temperature, rows=rows)
    torch.testing.assert_close(found, by_attention(problem, span, shorter, temperature, rows))
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-9
    nothing = kept_mass(**problem, span=span, shorter=span[..., None], temperature=temperature, rows=rows)
    torch.testing.assert_close(nothing, torch.ones_like(nothing))


@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (5, 5), (256, 256), (1000, 1000), (8192, 10000), (3, 10**6)])
def test_few_queries_are_looked_at_and_the_last_is_one_of_them(length: int, num_keys: int) -> None:
    places = range(length)[sampled_queries(length, num_keys)]
    assert places[-1] == length - 1
    assert 1 <= len(places) <= MOST_QUERIES
    assert len(places) == 1 or len(places) * num_keys <= MOST_SCORES
    assert len(places) == length or len(places) > min(MOST_QUERIES, MOST_SCORES // num_keys) / 2


def seen(module: FocusBranch, *inputs: Tensor) -> FocusRecord:
    records: list[FocusRecord] = []
    with observe(lambda _, record: records.append(record)):
        module(*inputs)
    return records[0]


def looking_back(distance: int, length: int = 32) -> tuple[Tensor, ...]:
    """Inputs of a branch of 4 heads × 64 in which every query attends to the token `distance` before it alone."""
    places = 30 * torch.eye(length, 64)
    query = places.roll(distance, dims=0)
    return (*(x.expand(1, 4, -1, -1) for x in (query, places, places)), torch.zeros(1, length, 4, 64))


@pytest.mark.parametrize(("distance", "least", "most"), [(0, 0, 1), (9, 7, 12)])
@pytest.mark.parametrize("per_head", [True, False])
def test_spans_come_to_reach_what_is_attended_to_and_not_much_more(
    distance: int, least: float, most: float, per_head: bool
) -> None:
    config = FocusConfig(max_span=24, ramp=2, refiner=True, initial_span=0.99, per_head_span=per_head, local_start=1.0)
    module, inputs = FocusBranch(config, 4, 64, 64), looking_back(distance)
    before = seen(module.eval(), *inputs).span[..., 9:]
    for _ in range(60):
        module.train()(*inputs).sum().backward()
        module.zero_grad()
    span = seen(module.eval(), *inputs).span[..., 9:]
    assert before.min() > 23
    assert least <= span.min()
    assert span.max() <= most


def test_nothing_is_explored() -> None:
    """All corrections are compared: none has to be tried."""
    module = branch(reward="mass", epsilon=1.0)
    actions = [seen(module.train(mode), *branch_inputs()).action for mode in (True, False)]
    assert torch.equal(*actions)


def test_padding_teaches_nothing() -> None:
    tables = []
    for padding in (0.0, 30.0):
        module, (*local, globe) = branch(reward="mass").train(), branch_inputs()
        for x in local:
            x[:, :, :5] = padding
        globe[:, :5] = padding
        module(*local, globe, (torch.arange(16) >= 5).expand(2, 1, 16, 16).tril()).sum().backward()
        tables.append(module.eval().refiner.table)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], branch().refiner.table)


def test_a_query_that_the_loss_does_not_need_teaches_nothing() -> None:
    tables = []
    for other in (0.0, 3.0):
        module, (query, *others) = branch(reward="mass").train(), branch_inputs()
        query[:, :, :8] += other
        module(query, *others)[:, 8:].square().sum().backward()
        tables.append(module.eval().refiner.table)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], branch().refiner.table)


def test_queries_count_by_the_size_of_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = branch(reward="mass", join=False).train(), {}
    start, learn = module.refiner.table.clone(), module.refiner.learn
    monkeypatch.setattr(module.refiner, "learn", lambda *args, **lesson: told.update(lesson) or learn(*args, **lesson))
    size = torch.rand(2, 4, 16, 1)
    (module.attend(*branch_inputs()) * size).sum().backward()
    weight, reward = size[..., 0], told["reward"]
    expected = start.clone()
    for state in told["state"].unique().tolist():
        here = told["state"] == state
        mean = (weight[..., None] * reward)[here].sum(0) / weight[here].sum()
        expected[state] += module.refiner.alpha * (mean - start[state])
    torch.testing.assert_close(module.eval().refiner.table, expected)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_without_a_gradient_nothing_is_learned(bad: float) -> None:
    module = branch(reward="mass").train()
    (module(*branch_inputs()) * bad).sum().backward()
    assert torch.equal(module.eval().refiner.table, branch().refiner.table)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_teaches_it_once(reentrant: bool) -> None:
    modules = [branch(reward="mass").train() for _ in range(2)]
    for module, again in zip(modules, (False, True), strict=True):
        inputs = [x.requires_grad_() for x in branch_inputs()]
        output = checkpoint(module, *inputs, use_reentrant=reentrant) if again else module(*inputs)
        output.sum().backward()
    assert_same_buffers(modules[0].eval(), buffers(modules[1].eval()))
    assert modules[0].refiner.num_updates == 1
