"""Every setting and every weight of FocusA acts."""

import dataclasses
from typing import Any

import pytest
import torch
from branch_runs import assert_acts, observed, run
from helpers import DIM, HEADS, VALUE_DIM, assert_every_parameter_learns, branch, branch_inputs, fill
from torch import nn

from hf_focus import FocusA, FocusConfig
from hf_focus.branch import FocusBranch

SYMMETRIC = {"is_causal": False}
# One that stops some queries and not others
STOPS_SOME = {"base_threshold": 0.15}

# Of each setting: two values that must not give the same, what else is set, and arguments of the forward
ACTS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "max_span": (8, 5, {}, {}),
    "max_iterations": (3, 1, {}, {}),
    "ramp": (4, 1, {}, {}),
    "span_granularity": ("token", "window", {}, SYMMETRIC),
    "window_size": (2, 8, {"span_granularity": "window"}, SYMMETRIC),
    "qk_norm": (True, False, {}, {}),
    "temperature": ("learned", "seed", {}, {}),
    "sharpen": (True, False, {"temperature": "seed"}, {}),
    "temp_scale": (0.01, 0.5, {"temperature": "seed"}, {}),
    "feedback": ("normalized", "additive", {}, {}),
    "anchored": (True, False, {}, {}),
    "readout": ("mixture", "last", {}, {}),
    "readout_from": ("both", "query", {}, {}),
    "combine": ("per_head", "projection", {}, {}),
    "stop": ("absolute", "relative", STOPS_SOME, {}),
    "base_threshold": (0.15, 0.0, {}, {}),
    "threshold_scale": (0.1, 0.9, STOPS_SOME, {}),
    "refiner": (True, False, {}, {}),
    "num_actions": (10, 3, {}, {}),
}
# What shows in the values that training starts from
STARTS = {
    "initial_span": (0.5, 0.1),
    "readout_bias": (0.0, 3.0),
    "mix_start": (0.5, 0.9),
    "gain_start": (1.0, 0.3),
    "exponent_start": (0.0, 1.0),
}
# What shows in what the refiner learns
TEACHES = {
    "reward": ("seed", "loss"),
    "span_cost": (0.01, 0.9),
    "alpha": (0.1, 0.5),
    "gamma": (0.9, 0.1),
    "epsilon": (0.1, 0.9),
    "entropy_weight": (0.1, 0.7),
    "coverage_threshold": (0.01, 0.3),
}
ELSEWHERE = {
    "max_dist": "test_max_dist_and_sinks",
    "sink_tokens": "test_max_dist_and_sinks",
    "per_head_span": "test_a_span_a_head",
    "span_penalty": "test_penalty.py",
    "backend": "test_backends_agree",
    "feedback_through": "test_projections.py",
    "rotate_feedback": "test_rotary.py",
    "global_rotation": "test_global_positions.py",
    "global_exponent_start": "test_global_exponent.py",
    "layers": "test_architectures.py",
    "modules": "test_patching.py",
    "local_start": "test_local_start",
    "global_attn_implementation": "test_architectures.py",
}


def test_every_setting_is_tested() -> None:
    tested = [*ACTS, *STARTS, *TEACHES, *ELSEWHERE]
    assert sorted(tested) == sorted(field.name for field in dataclasses.fields(FocusConfig))


@pytest.mark.parametrize("name", ACTS)
def test_settings_act(name: str) -> None:
    on, off, settings, kwargs = ACTS[name]
    assert_acts(*(run(branch(**{**settings, name: value}), **kwargs) for value in (on, off)))


@pytest.mark.parametrize("name", STARTS)
def test_settings_of_the_start_act(name: str) -> None:
    results = []
    for value in STARTS[name]:
        module = FocusBranch(FocusConfig(max_span=8, ramp=4, **{name: value}), HEADS, DIM, VALUE_DIM).eval()
        results.append(module.attend(*branch_inputs()))
    assert_acts(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_of_queries_and_keys_and_the_scaling_do_not_matter(dtype: torch.dtype) -> None:
    module, (query, key, *others) = branch(qk_norm=True).to(dtype), branch_inputs(dtype=dtype)
    output = module(query, key, *others)
    assert torch.equal(module(4 * query, key / 8, *others, scaling=3.0), output)


def test_normalized_queries_and_keys_are_as_vectors_of_that_size() -> None:
    query, key, *others = branch_inputs()
    output = branch(qk_norm=True)(query, key, *others)
    query, key = (DIM**0.5 * x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    torch.testing.assert_close(branch()(query, key, *others), output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_normalized_with_a_cache_is_as_without(masked: bool) -> None:
    """Keys out of reach are left out before they are normalised."""
    module, (query, key, value, globe) = branch(qk_norm=True, max_span=5), branch_inputs()
    mask = torch.ones(16, 16, dtype=torch.bool).tril().expand(2, 1, 16, 16) if masked else None
    whole = module(query, key, value, globe, mask)
    last = slice(13, 16)
    part = module(
        query[:, :, last], key, value, globe[:, last], mask if mask is None else mask[:, :, last], query_offset=13
    )
    torch.testing.assert_close(part, whole[:, last])


def test_a_padded_key_of_zeros_has_a_finite_gradient() -> None:
    module, (query, key, *others) = branch(qk_norm=True), branch_inputs()
    query[:, :, :5], key[:, :, :5] = 0, 0
    inputs = [x.requires_grad_() for x in (query, key, *others)]
    module(*inputs).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("combine", ["per_head", "projection"])
def test_local_start(combine: str) -> None:
    """An untrained branch adds the local output, so many times, to the global one."""
    shape = (HEADS, DIM, DIM)
    silent, loud = (
        FocusBranch(FocusConfig(max_span=8, combine=combine, local_start=start), *shape).eval() for start in (0.0, 0.5)
    )
    query, key, _, _ = branch_inputs()
    inputs = (query, key, key, query.transpose(1, 2))
    assert torch.equal(silent(*inputs), inputs[3])
    torch.testing.assert_close(loud(*inputs), inputs[3] + 0.5 * loud.attend(*inputs).transpose(1, 2))


def test_a_read_out_from_both_learns_from_the_global_output() -> None:
    module = branch(readout_from="both").train()
    run(module).square().sum().backward()
    assert_every_parameter_learns(module)
    assert branch().readout_global_weight is None


@pytest.mark.parametrize("name", TEACHES)
def test_settings_of_the_refiner_act(name: str) -> None:
    tables = []
    for value in TEACHES[name]:
        module = branch(**{"reward": "mass" if name == "span_cost" else "seed", name: value}).train()
        torch.manual_seed(0)
        run(module).sum().backward()
        tables.append(module.eval().refiner.table)
    assert_acts(*tables)


@pytest.mark.parametrize("granularity", ["token", "window", "sequence"])
def test_granularities(granularity: str) -> None:
    """How far around a token its span looks."""
    module = branch(span_granularity=granularity, window_size=6, refiner=False)
    inputs = list(branch_inputs())
    before = observed(module, lambda: module(*inputs, is_causal=False)).span
    inputs[3] = inputs[3].clone()
    inputs[3][:, 8] += 1
    after = observed(module, lambda: module(*inputs, is_causal=False)).span
    changed = ((before - after).abs() > 1e-6).all(dim=(0, 1)).nonzero().flatten().tolist()
    assert changed == {"token": [8], "window": list(range(5, 12)), "sequence": list(range(16))}[granularity]
    if granularity == "sequence":
        torch.testing.assert_close(before, before[..., :1].expand_as(before))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("temperature", ["learned", "seed"])
def test_a_span_a_head(per_head: bool, temperature: str) -> None:
    module = branch(per_head_span=per_head, temperature=temperature)
    record = observed(module, lambda: run(module))
    shape = (2, HEADS if per_head else 1, 16)
    assert record.span.shape == record.action.shape == shape
    assert record.iterations.shape == record.entropy.shape == (2, HEADS, 16)
    if per_head:
        assert record.span.std(dim=1).min() > 0


@pytest.mark.parametrize("part", ["predictor.weight", "feedback_matrix", "mix", "log_gain", "span.coefficients"])
def test_weights_act(part: str) -> None:
    module = branch()
    before = run(module)
    module.get_parameter(part).data.zero_()
    assert_acts(before, run(module))


@pytest.mark.parametrize("is_causal", [True, False])
def test_backends_agree(is_causal: bool) -> None:
    results = [run(branch(backend=b), length=100, is_causal=is_causal) for b in ("auto", "blocked", "reference")]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def layer(**settings: Any) -> FocusA:
    settings = {"max_span": 3, "ramp": 1, "is_causal": True, **settings}
    module = fill(FocusA(16, 4, **settings), std=0.4).eval()
    nn.init.constant_(module.focus.predictor.bias, 10)
    return module


def influences(module: FocusA, position: int) -> list[int]:
    """The tokens that `position` can see."""
    x = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    before, seen = module(x), []
    for token in range(20):
        changed = x.clone()
        changed[:, token] += torch.linspace(-1, 1, 16)
        if not torch.equal(module(changed)[:, position], before[:, position]):
            seen.append(token)
    return seen


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, [*range(16)]),
        ({"max_dist": 6}, [*range(10, 16)]),
        ({"max_dist": 6, "sink_tokens": 2}, [0, 1, *range(10, 16)]),
        ({"max_dist": 1}, [13, 14, 15]),
        ({"max_dist": 4, "is_causal": False, "span_granularity": "token"}, [*range(12, 19)]),
        ({"max_dist": 100}, [*range(16)]),
    ],
)
def test_max_dist_and_sinks(settings: dict[str, Any], seen: list[int]) -> None:
    assert influences(layer(refiner=False, **settings), 15) == seen
