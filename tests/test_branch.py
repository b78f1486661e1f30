"""Every part of FocusA acts, and every part that should learn does."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DIM,
    HEADS,
    VALUE_DIM,
    LargestTensor,
    assert_every_parameter_learns,
    assert_same_buffers,
    branch,
    branch_inputs,
    buffers,
    fill,
)
from tiny import TINY, randomize, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_focus import FocusA, FocusConfig, FocusRecord, apply_focus, record_focus
from hf_focus.branch import FocusBranch
from hf_focus.observers import observe

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
STARTS = {"initial_span": (0.5, 0.1), "readout_bias": (0.0, 3.0), "mix_start": (0.5, 0.9), "gain_start": (1.0, 0.3)}
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
    "span_penalty": "test_span_penalty",
    "backend": "test_backends_agree",
    "feedback_through": "test_projections.py",
    "layers": "test_architectures.py",
    "modules": "test_patching.py",
    "local_start": "test_local_start",
    "global_attn_implementation": "test_architectures.py",
}


def run(module: FocusBranch, length: int = 16, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    return module(*branch_inputs(length, dtype=dtype), **kwargs)


def observed(module: FocusBranch, call: Callable[[], Any]) -> FocusRecord:
    records: list[FocusRecord] = []
    with observe(lambda _, record: records.append(record)):
        call()
    assert len(records) == 1
    return records[0]


def assert_acts(one: Tensor, other: Tensor) -> None:
    assert one.isfinite().all()
    assert (one - other).abs().max() > 1e-3


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


VARIANTS = {
    "default": {},
    "seed": {
        "per_head_span": False,
        "temperature": "seed",
        "feedback": "additive",
        "readout": "last",
        "combine": "projection",
        "max_iterations": 10,
    },
    "anchored": {"anchored": True, "stop": "relative"},
    "additive mixture": {"feedback": "additive", "base_threshold": 0.0},
    "normalized last": {"readout": "last", "anchored": True},
    "shared learned": {"per_head_span": False, "combine": "projection"},
    "one iteration": {"max_iterations": 1},
    "no refiner": {"refiner": False},
    "reference": {"backend": "reference"},
    "normalized queries and keys": {"qk_norm": True, "anchored": True},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", [None, "token", "window", "sequence"])
def test_every_parameter_learns(settings: dict[str, Any], dtype: torch.dtype, granularity: str | None) -> None:
    """Causal, or not and then with every granularity."""
    module = branch(**settings, span_granularity=granularity or "token").to(dtype).train()
    torch.manual_seed(0)
    output = run(module, dtype=dtype, is_causal=granularity is None)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert_every_parameter_learns(module)


@variants
def test_untrained_is_silent_and_its_join_learns(settings: dict[str, Any]) -> None:
    module = FocusBranch(FocusConfig(max_span=8, ramp=4, **settings), HEADS, DIM, VALUE_DIM)
    *inputs, global_output = branch_inputs()
    output = module(*inputs, global_output)
    assert torch.equal(output, global_output)
    output.square().sum().backward()
    assert module.join.grad.isfinite().all()
    # Both halves of it, that of the local output and that of the global one
    assert (module.join.grad.flatten(0, -2).abs().amax(-1) > 0).all()


@variants
def test_eval_is_deterministic_and_changes_no_buffer(settings: dict[str, Any]) -> None:
    module = branch(**settings)
    before = buffers(module)
    first = run(module)
    first.sum().backward()
    assert torch.equal(first, run(module))
    assert_same_buffers(module, before)


@variants
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_strictly_causal(settings: dict[str, Any], training: bool) -> None:
    module, position = branch(**settings).train(training), 70
    inputs = branch_inputs(length=100)
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[:, :, position:] += 1
    changed[3][:, position:] -= 1
    results = []
    for x in (inputs, changed):
        torch.manual_seed(0)
        results.append(module(*x))
    assert torch.equal(results[0][:, :position], results[1][:, :position])
    assert_acts(results[0][:, position:], results[1][:, position:])


@variants
@pytest.mark.parametrize("granularity", [None, "window", "sequence"])
def test_alone_is_as_in_a_batch(settings: dict[str, Any], granularity: str | None) -> None:
    """Beside a longer sequence, with padding on the left that is anything but zero."""
    module = branch(**settings, span_granularity=granularity or "token", window_size=6)
    is_causal = granularity is None
    inputs, padded = branch_inputs(length=20), 7
    for x in inputs[:3]:
        x[1, :, :padded] = 30
    inputs[3][1, :padded] = -30
    mask = (torch.arange(20) >= torch.tensor([[0], [padded]]))[:, None, None].expand(2, 1, 20, 20)
    mask = mask & torch.ones(20, 20, dtype=torch.bool).tril() if is_causal else mask
    together = module(*inputs, mask, is_causal=is_causal)
    assert together.isfinite().all()
    alone = module(*(x[1:, :, padded:] for x in inputs[:3]), inputs[3][1:, padded:], is_causal=is_causal)
    torch.testing.assert_close(together[1:, padded:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_last_query_of_a_cache(as_tensor: bool) -> None:
    """One query with the keys before it, and places still empty behind it, is the last of all queries."""
    module, (query, key, value, global_output) = branch(), branch_inputs()
    expected = module(query, key, value, global_output)[:, -1:]
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 5 * as_tensor), value=9) for x in (key, value))
    offset = torch.tensor(15) if as_tensor else 15
    last = module(query[:, :, -1:], key, value, global_output[:, -1:], query_offset=offset)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)


def test_sliding_window_is_respected() -> None:
    module, inputs = branch(max_span=8, initial_span=0.9), branch_inputs()
    before = module(*inputs, sliding_window=3)
    inputs[1][:, :, 5] += 1
    inputs[2][:, :, 5] += 1
    changed = (before - module(*inputs, sliding_window=3)).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("settings", [{}, {"feedback": "additive", "combine": "projection"}])
def test_precisions_agree(settings: dict[str, Any]) -> None:
    module = branch(**settings, base_threshold=0.0, refiner=False)
    inputs = [x.bfloat16() for x in branch_inputs()]
    exact = copy.deepcopy(module).bfloat16().double()(*(x.double() for x in inputs))
    assert exact.dtype == torch.float64
    reference = branch(**settings, base_threshold=0.0, refiner=False, backend="reference").bfloat16().double()
    torch.testing.assert_close(reference(*(x.double() for x in inputs)), exact, rtol=1e-9, atol=1e-9)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        result = copy.deepcopy(module).bfloat16().to(dtype)(*(x.to(dtype) for x in inputs))
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{}, {"feedback": "additive", "combine": "projection"}])
def test_autocast(settings: dict[str, Any]) -> None:
    """Outputs and gradients under autocast are those without it, up to the precision of bfloat16."""
    results = []
    for enabled in (False, True):
        module = branch(**settings, base_threshold=0.0, refiner=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = run(module)
        output.float().square().mean().backward()
        grads = [parameter.grad.flatten() for parameter in module.parameters()]
        results.append((output.float(), torch.cat(grads)))
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("granularity", [None, "token", "window", "sequence"])
@pytest.mark.parametrize("mask", ["none", "given"])
def test_never_queries_times_keys(granularity: str | None, mask: str) -> None:
    is_causal = granularity is None
    length = 1024
    module = branch(span_granularity=granularity or "token", max_span=64).train()
    inputs = [x.requires_grad_() for x in branch_inputs(length, batch=1)]
    given = None
    if mask == "given":
        given = torch.ones(1, 1, length, length, dtype=torch.bool)
        given = given.tril() if is_causal else given
    with LargestTensor() as largest:
        module(*inputs, given, is_causal=is_causal).sum().backward()
    assert largest.elements < length * length / 4


@pytest.mark.parametrize(
    "part",
    [
        "predictor.weight",
        "predictor.bias",
        "span.coefficients",
        "feedback_matrix",
        "mix",
        "log_gain",
        "readout_weight",
        "readout_bias",
        "join",
    ],
)
def test_weights_learn(part: str) -> None:
    """From its start, one weight alone learns what it is in a teacher whose other weights are the same."""
    teacher = branch(refiner=False, base_threshold=0.0, max_iterations=2)
    inputs = branch_inputs(batch=8)
    with torch.no_grad():
        target = teacher(*inputs)
    student = copy.deepcopy(teacher).requires_grad_(False)
    start = FocusBranch(teacher.config, HEADS, DIM, VALUE_DIM).get_parameter(part)
    weight = student.get_parameter(part)
    weight.data.copy_(start)
    weight.requires_grad_()
    optimizer, losses = torch.optim.Adam([weight], lr=0.03), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(student(*inputs), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 5e-5
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("wanted", ["short", "long"])
def test_predictor_learns_how_far_to_look(wanted: str) -> None:
    """From the loss alone: to be the own value asks for a short span, to be the mean of eight for a long one."""
    module = branch(refiner=False, temperature="seed", max_iterations=1)
    module.predictor.reset_parameters()
    optimizer, shares = torch.optim.Adam(module.predictor.parameters(), lr=0.05), []
    for seed in range(80):
        query, key, value, global_output = branch_inputs(batch=8, length=32, seed=seed)
        target = value.repeat_interleave(2, dim=1)
        if wanted == "long":
            target = nn.functional.pad(target, (0, 0, 7, 0)).unfold(2, 8, 1).mean(dim=-1)

        def loss(
            inputs: tuple[Tensor, ...] = (query * 0, key, value, global_output), target: Tensor = target
        ) -> Tensor:
            return (module.attend(*inputs) - target)[:, :, 8:].square().mean()

        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        shares.append(observed(module, loss).span_fraction.mean().item())
    assert shares[-1] < shares[0] - 0.3 if wanted == "short" else shares[-1] > shares[0] + 0.3


def test_refiner_learns() -> None:
    """Where a diffuse attention costs much, it comes to shorten the spans that the predictor gives."""
    settings = {
        "reward": "seed",
        "ramp": 1,
        "num_actions": 3,
        "entropy_weight": 1.0,
        "gamma": 0.0,
        "alpha": 0.5,
        "epsilon": 0.5,
    }
    module = branch(**settings)
    module.refiner.table.zero_()
    module.predictor.reset_parameters()
    module.predictor.bias.data.fill_(3.0)

    def look(seed: int) -> tuple[float, float]:
        module.eval()
        record = observed(module, lambda: module(*branch_inputs(seed=seed)))
        return (record.coverage - record.entropy).mean().item(), record.span.mean().item()

    reward, span = look(seed=999)
    assert span > 7
    torch.manual_seed(0)
    module.train()
    for seed in range(60):
        module(*branch_inputs(batch=8, seed=seed)).sum().backward()
        module.zero_grad()
    learned_reward, learned_span = look(seed=999)
    assert learned_reward > reward + 0.5
    assert learned_span < span / 2
    assert module.refiner.num_updates.item() == 60


@pytest.mark.parametrize("per_head", [True, False])
def test_refiner_is_told_what_happened(per_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, step = branch(reward="seed", num_actions=3, per_head_span=per_head).train(), {}
    monkeypatch.setattr(module.refiner, "learn", lambda output, **entries: step.update(entries) or output)
    record = observed(module, lambda: run(module))
    predicted, log_keys = step["features"][..., 0], step["features"][..., 1]
    visible = torch.arange(1, 17).clamp_max(8).expand_as(predicted)
    torch.testing.assert_close(log_keys, visible.log())
    torch.testing.assert_close(record.span_fraction, predicted * step["action"] / 2)
    assert torch.equal(step["action"], record.action)
    assert torch.equal(step["state"], module.refiner.discretize(step["features"]))
    reward = record.coverage - 0.1 * record.entropy
    torch.testing.assert_close(step["reward"], reward if per_head else reward.mean(1, keepdim=True))
    assert step["valid"].shape == step["state"].shape
    assert step["valid"].all()
    # The next state is made from the span that was chosen and the keys in it
    chosen = step["features"].clone()
    chosen[..., 0] = record.span_fraction
    chosen[..., 1] = (1 + record.span.floor()).minimum(visible).log()
    assert torch.equal(step["next_state"] % 100, module.refiner.discretize(chosen) % 100)
    assert not torch.equal(step["next_state"] % 100, step["state"] % 100)


def test_refiner_learns_from_tokens_only() -> None:
    """Padding, here a third of all, is never part of what it learns."""
    tables = []
    for padded in (0, 8):
        module, (*local, global_output) = branch(epsilon=0.0).train(), branch_inputs()
        local = [nn.functional.pad(x, (0, 0, padded, 0), value=30.0) for x in local]
        global_output = nn.functional.pad(global_output, (0, 0, 0, 0, padded, 0), value=-30.0)
        length = 16 + padded
        mask = (torch.arange(length) >= padded) & torch.ones(length, length, dtype=torch.bool).tril()
        module(*local, global_output, mask.expand(2, 1, length, length)).sum().backward()
        tables.append(buffers(module.eval()))
    for name, buffer in tables[0].items():
        torch.testing.assert_close(buffer, tables[1][name], rtol=1e-4, atol=1e-5, msg=name)


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


def penalized(weight: float, **settings: Any) -> PreTrainedModel:
    settings = {"max_span": 8, "ramp": 4, "max_iterations": 2, "refiner": False, **settings}
    return randomize(apply_focus(TINY["llama"].build(), FocusConfig(span_penalty=weight, **settings))).train()


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("padded", [0, 6])
@pytest.mark.parametrize("return_dict", [True, False])
def test_span_penalty(per_head: bool, padded: int, return_dict: bool) -> None:
    """The loss holds the weight times the mean span of tokens, as a share of the longest."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :padded] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "return_dict": return_dict}
    plain = penalized(0.0, per_head_span=per_head)
    with record_focus(plain) as records:
        loss = plain(**inputs)[0]
    assert len(records) == 2
    shares = [calls[0].span_fraction.transpose(1, 2)[mask.bool()].mean() for calls in records.layers.values()]
    model = penalized(0.7, per_head_span=per_head)
    torch.testing.assert_close(model(**inputs)[0], loss + 0.7 * sum(shares) / 2)
    # Of training only
    model.eval()
    torch.testing.assert_close(model(**inputs)[0], loss)


def test_span_penalty_shortens_the_span() -> None:
    ids = tokens(2, 20)
    spans = {}
    for weight in (0.0, 3.0):
        model = penalized(weight)
        predictors = [parameter for name, parameter in model.named_parameters() if ".predictor." in name]
        optimizer = torch.optim.SGD(predictors, lr=2.0)
        for _ in range(10):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        with record_focus(model) as records, torch.no_grad():
            model(input_ids=ids)
        spans[weight] = torch.stack([calls[0].span_fraction.mean() for calls in records.layers.values()])
    assert (spans[3.0] < spans[0.0] - 0.2).all()
