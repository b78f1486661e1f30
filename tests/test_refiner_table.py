"""The refiner's table: actions, states, temporal-difference updates, statistics, precision."""

import pytest
import torch
from helpers import assert_same_buffers, buffers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_refiners import ACTIONS, SAVED, STATES, assert_close_buffers, random_refiner, random_step
from torch import nn

import hf_focus.refiner
from hf_focus import Refiner


def test_the_seeds_sizes() -> None:
    refiner = Refiner()
    assert refiner.table.shape == (10000, 10)
    assert (refiner.alpha, refiner.gamma, refiner.epsilon) == (0.1, 0.9, 0.1)


@pytest.mark.parametrize("training", [False, True])
def test_ties_mean_the_last_action(training: bool) -> None:
    refiner = Refiner(STATES, ACTIONS, epsilon=0.0).train(training)
    refiner.table[1] = torch.tensor([0.5, 2.0, 2.0, 1.0])
    refiner.table[2] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    refiner.table[3] = -7
    action = refiner.choose_action(torch.arange(4))
    assert action.tolist() == [ACTIONS - 1, 2, 0, ACTIONS - 1]


def test_actions_are_factors() -> None:
    factors = Refiner(STATES, ACTIONS).action_to_span_scale(torch.arange(ACTIONS))
    torch.testing.assert_close(factors, torch.tensor([0, 1 / 3, 2 / 3, 1]))


def test_eval_is_greedy_and_changes_nothing() -> None:
    refiner = random_refiner(epsilon=1.0).eval()
    before, state = buffers(refiner), torch.randint(STATES, (50, 7))
    assert torch.equal(refiner.choose_action(state), refiner.table.argmax(-1)[state])
    features = torch.randn(50, 7, 4)
    assert torch.equal(refiner.discretize(features), refiner.discretize(features))
    assert_same_buffers(refiner, before)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.0])
def test_share_of_random_actions(epsilon: float) -> None:
    refiner = random_refiner(epsilon=epsilon).train()
    torch.manual_seed(0)
    state = torch.randint(STATES, (200_000,))
    action = refiner.choose_action(state)
    other = action != refiner.table.argmax(-1)[state]
    # A random action may be the best one
    expected = epsilon * (ACTIONS - 1) / ACTIONS
    assert abs(other.float().mean().item() - expected) < 0.005
    if epsilon == 1.0:
        share = torch.bincount(action, minlength=ACTIONS) / action.numel()
        assert (share - 1 / ACTIONS).abs().max() < 0.005


def test_states() -> None:
    refiner = Refiner()
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(100_000, 4, generator=noise) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + torch.arange(4)
    refiner.mean.copy_(features.mean(0))
    refiner.variance.copy_(features.var(0))
    state = refiner.discretize(features)
    assert state.min() >= 0
    assert state.max() < 10_000
    # Every feature by itself: ten bins in order, none rare
    for index in range(4):
        digit = state // 10**index % 10
        assert torch.bincount(digit, minlength=10).min() > 1000
        order = features[:, index].argsort()
        assert (digit[order].diff() >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_states_of_numbers_that_are_none(value: float) -> None:
    state = Refiner().discretize(torch.full((3, 4), value))
    assert (state >= 0).all()
    assert (state < 10_000).all()


@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1), gamma=st.floats(0, 0.99), masked=st.booleans())
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_update_is_the_slow_loop(seed: int, alpha: float, gamma: float, masked: bool) -> None:
    refiner, step = random_refiner(seed, alpha=alpha, gamma=gamma), random_step(seed)
    if not masked:
        step["valid"] = None
    table = refiner.table.double()
    errors: dict[tuple[int, int], list[float]] = {}
    valid = torch.ones(2, 3, 5).bool() if step["valid"] is None else step["valid"]
    columns = (step[name].flatten().tolist() for name in ("state", "action", "reward", "next_state"))
    for state, action, reward, next_state, learn in zip(*columns, valid.flatten().tolist(), strict=True):
        if learn:
            target = reward + gamma * max(table[next_state].tolist())
            errors.setdefault((state, action), []).append(target - table[state, action].item())
    expected = table.clone()
    for pair, values in errors.items():
        expected[pair] += alpha * sum(values) / len(values)
    refiner.update(**step)
    torch.testing.assert_close(refiner.table.double(), expected, rtol=1e-5, atol=1e-5)
    assert refiner.num_updates.item() == 1


def test_order_and_batching_do_not_matter() -> None:
    whole, parts = random_refiner(), random_refiner()
    step = random_step()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    whole.update(**step)
    parts.update(**{name: x.reshape(30, *x.shape[3:])[order].view(5, 6, *x.shape[3:]) for name, x in step.items()})
    assert_close_buffers(whole, parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_padding_is_never_learned_from(value: float) -> None:
    padded, alone = random_refiner(), random_refiner()
    step = random_step()
    valid = step.pop("valid")
    alone.update(**{name: x[valid] for name, x in step.items()})
    step["reward"][~valid] = value
    step["features"][~valid] = value
    padded.update(**step, valid=valid)
    assert_close_buffers(padded, alone)
    before = buffers(padded)
    padded.update(**step, valid=torch.zeros_like(valid))
    for name in ("table", "mean", "variance"):
        assert torch.equal(padded.get_buffer(name), before[name]), name


def test_statistics_are_those_of_the_data() -> None:
    refiner = random_refiner()
    scale, shift = torch.tensor([1.0, 10.0, 0.1, 3.0]), torch.tensor([0.0, -20.0, 5.0, 1.0])
    data = torch.randn(50, 40, 4, generator=torch.Generator().manual_seed(0)) * scale + shift
    # Batches with means of their own
    data += torch.linspace(-2, 2, 50)[:, None, None]
    for rows in data:
        step = {**random_step(shape=(40,)), "features": rows, "valid": None}
        refiner.update(**step)
    torch.testing.assert_close(refiner.mean, data.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refiner.variance, data.flatten(0, 1).var(0, unbiased=False), rtol=1e-3, atol=1e-3)


def test_statistics_follow_the_data() -> None:
    """What was seen long ago is forgotten."""
    refiner, noise = random_refiner(), torch.Generator().manual_seed(0)
    for index in range(1000):
        features = torch.randn(200, 4, generator=noise)
        features = features if index < 200 else 5 + 2 * features
        refiner.update(**{**random_step(shape=(200,)), "features": features, "valid": None})
    torch.testing.assert_close(refiner.mean, torch.full((4,), 5.0), rtol=0.02, atol=0)
    torch.testing.assert_close(refiner.variance, torch.full((4,), 4.0), rtol=0.05, atol=0)


def test_statistics_stay_without_features() -> None:
    refiner = random_refiner()
    before = buffers(refiner)
    refiner.update(**{**random_step(), "features": None})
    assert torch.equal(refiner.mean, before["mean"])
    assert torch.equal(refiner.variance, before["variance"])
    assert not torch.equal(refiner.table, before["table"])


def test_processes_learn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sums of all processes added, each has the table of the whole batch."""
    step, sent = random_step(), []
    halves = [{name: x[row] for name, x in step.items()} for row in range(2)]
    whole = random_refiner()
    whole.update(**step)
    monkeypatch.setattr(hf_focus.refiner, "is_available", lambda: True)
    monkeypatch.setattr(hf_focus.refiner, "is_initialized", lambda: True)
    monkeypatch.setattr(hf_focus.refiner, "all_reduce", lambda sums: sent.append(sums.clone()))
    for half in halves:
        random_refiner().update(**half)
    total = sent[0] + sent[1]
    monkeypatch.setattr(hf_focus.refiner, "all_reduce", lambda sums: sums.copy_(total))
    for half in halves:
        one = random_refiner()
        one.update(**half)
        assert_close_buffers(one, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_table_keeps_its_precision(dtype: torch.dtype) -> None:
    refiner = random_refiner()
    refiner.update(**random_step())
    before = buffers(refiner)
    model = nn.Sequential(nn.Linear(2, 2), refiner).to(dtype)
    assert model[0].weight.dtype == dtype
    assert_same_buffers(refiner, before)
    for name, buffer in refiner.named_buffers():
        assert buffer.dtype == before[name].dtype, name
    model.to("meta", torch.float32)
    assert all(buffer.is_meta and buffer.dtype == before[name].dtype for name, buffer in refiner.named_buffers())


def test_half_keeps_the_tables_precision() -> None:
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        refiner = random_refiner()
        before = refiner.table.clone()
        assert torch.equal(change(refiner).table, before)


def test_small_steps_survive_half_precision() -> None:
    refiner = Refiner(STATES, ACTIONS, alpha=1e-3, gamma=0.0).to(torch.bfloat16)
    refiner.table.fill_(1.0)
    state = torch.zeros(1, dtype=torch.long)
    for _ in range(100):
        refiner.update(state, state, torch.zeros(1, dtype=torch.bfloat16), state)
    torch.testing.assert_close(refiner.table[0, 0], torch.tensor(0.999**100))


def test_saved_is_loaded() -> None:
    refiner, other = random_refiner(), Refiner(STATES, ACTIONS)
    refiner.update(**random_step())
    assert set(refiner.state_dict()) == set(SAVED)
    other.load_state_dict(refiner.state_dict())
    assert_same_buffers(other, buffers(refiner))


def test_rounding_alone_makes_no_difference() -> None:
    """A statistic that is the same everywhere, as the spans are before the predictor has learned."""
    refiner, noise = Refiner(), 1 + 1e-7 * torch.randn(64, 4)
    state = torch.zeros(64, dtype=torch.long)
    refiner.update(state, state, torch.zeros(64), features=noise)
    assert len(refiner.discretize(noise).unique()) == 1


def test_a_step_without_tokens_is_none() -> None:
    refiner = Refiner()
    nothing = {"state": torch.zeros(1, 4, dtype=torch.long), "action": torch.zeros(1, 4, dtype=torch.long)}
    features = torch.full((1, 4, 4), 10.0)
    for valid in (torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)):
        refiner.update(**nothing, reward=torch.ones(1, 4), next_state=nothing["state"], features=features, valid=valid)
    assert refiner.num_updates.item() == 1
    torch.testing.assert_close(refiner.mean, torch.full((4,), 10.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_does_not_stay(bad: float) -> None:
    refiner = Refiner()
    state = torch.arange(4)[None]
    reward, features = torch.ones(1, 4), torch.randn(1, 4, 4)
    reward[0, 1], features[0, 2, 3] = bad, bad
    action = torch.zeros_like(state)
    refiner.update(state=state, action=action, reward=reward, next_state=state, features=features)
    assert all(buffer.isfinite().all() for buffer in refiner.buffers())
    assert (refiner.table[[0, 3], 0] > 0).all()
    assert (refiner.table[[1, 2], 0] == 0).all()
