"""What the refiner does in one call: the statistics that it reads, the corrections it tries, what each reward says."""

from typing import Any

import pytest
import torch
from helpers import DIM, HEADS, KV_HEADS, branch, branch_inputs, buffers
from torch import Tensor

from hf_focus import kept_mass as kept_mass_module
from hf_focus.branch import FocusBranch
from hf_focus.correction import Correction, own_statistics

LENGTH = 40


def correction(module: FocusBranch, predicted: Tensor, learns: bool = True) -> Correction:
    query, key, value, global_output = branch_inputs(LENGTH)
    own = own_statistics(query, key, value, 0, DIM**-0.5)
    visible, valid = torch.arange(1, LENGTH + 1)[None, None], torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, :4] = False
    taught = valid if learns else None
    return Correction(module.refiner, module.config, predicted, visible, own, global_output, taught, True)


def spans(heads: int = HEADS) -> Tensor:
    return torch.rand(2, heads, LENGTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def lessons(module: FocusBranch, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> dict[str, Tensor]:
    """What `Refiner.learn` is given in a call."""
    told: dict[str, Tensor] = {}
    monkeypatch.setattr(module.refiner, "learn", lambda x, rule=None, **entries: told.update(entries) or x)
    module(*branch_inputs(LENGTH), **kwargs)
    return told


def test_a_query_is_compared_with_its_own_key_and_value() -> None:
    query, key, value, _ = branch_inputs(LENGTH, dtype=torch.float64)
    later = query[:, :, -7:]
    size, match = own_statistics(later, key, value, LENGTH - 7, 0.3)
    for head in range(HEADS):
        of_group = head // (HEADS // KV_HEADS)
        expected = 0.3 * (later[:, head] * key[:, of_group, -7:]).sum(-1)
        torch.testing.assert_close(match[:, head], expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(size[:, head], value[:, of_group, -7:].norm(dim=-1).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [HEADS, 1])
def test_the_loss_rewards_what_shortening_saves(heads: int) -> None:
    module = branch(reward="loss", epsilon=0.5, num_actions=4, per_head_span=heads > 1).train()
    module.refiner.reset_parameters()
    predicted = spans(heads)
    found = correction(module, predicted)
    torch.testing.assert_close(found.scale, predicted * found.action / 3)
    slope = torch.randn(found.scale.shape, generator=torch.Generator().manual_seed(2))
    (found.scale * slope).sum().backward()
    module.refiner.finish_step()
    learned, valid = buffers(module.refiner)["table"], found.lesson["valid"]
    unit = (slope * predicted.detach()).abs()[valid].mean()
    reward = slope * (predicted - found.scale).detach() / unit
    module.refiner.table.zero_()
    module.refiner.update(found.lesson["state"], found.action, reward, valid=valid)
    assert learned.any()
    torch.testing.assert_close(module.refiner.table, learned)


@pytest.mark.parametrize(("reward", "tries"), [("mass", False), ("loss", True), ("seed", True)])
def test_only_a_reward_of_what_was_done_tries_corrections(reward: str, tries: bool) -> None:
    module = branch(reward=reward, epsilon=1.0).train()
    module.refiner.reset_parameters()
    best = module.config.num_actions - 1
    assert (correction(module, spans()).action != best).any() == tries
    assert (correction(module, spans(), learns=False).action == best).all()


@pytest.mark.parametrize("reward", ["mass", "loss", "seed"])
def test_without_tokens_to_learn_from_nothing_is_learned(reward: str) -> None:
    module = branch(reward=reward).train()
    found = correction(module, spans(), learns=False)
    found.scale.sum().backward()
    assert not found.needs_statistics
    assert not module.refiner.pending.any()


@pytest.mark.parametrize("per_head", [True, False])
def test_of_a_long_row_some_queries_teach_what_they_would_in_all(
    per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = branch(reward="mass", per_head_span=per_head).train()
    some = lessons(module, monkeypatch)
    monkeypatch.setattr(kept_mass_module, "MOST_QUERIES", LENGTH)
    everything = lessons(module, monkeypatch)
    assert some["reward"].shape[2] == LENGTH // 2
    assert everything["reward"].shape[2] == LENGTH
    for name, entry in everything.items():
        if name != "action":
            torch.testing.assert_close(some[name], entry[:, :, 1::2], msg=name)
    if per_head:
        assert (everything["reward"][:, 0] - everything["reward"][:, 1]).abs().max() > 1e-3


def test_one_span_is_rewarded_by_the_mean_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    module, shares = branch(reward="mass", per_head_span=False).train(), []

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        shares.append(kept_mass_module.kept_mass(*args, **kwargs))
        return shares[-1]

    monkeypatch.setattr("hf_focus.branch.kept_mass", keep)
    told = lessons(module, monkeypatch)
    assert (shares[0][:, 0] - shares[0][:, 1]).abs().max() > 1e-3
    assert told["reward"].shape[1] == 1
    cost = module.config.span_cost * told["features"][..., :1] * module.refiner.action_to_span_scale(told["action"])
    torch.testing.assert_close(told["reward"], shares[0].mean(1, keepdim=True) - cost)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_state_that_follows_is_of_the_local_output(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = branch(reward="seed", num_actions=3).train()
    # In bins of their own, whatever they are
    module.refiner.variance.fill_(0.01)
    query, key, value, _ = branch_inputs(LENGTH)
    outputs = []
    monkeypatch.setattr(module.refiner, "learn", lambda x, rule=None, **entries: outputs.append((x, entries)) or x)
    module(*branch_inputs(LENGTH), is_causal=is_causal)
    (output, told), own = outputs[0], own_statistics(query, key, value, 0, DIM**-0.5)
    size, match = own
    scale = told["features"][..., 0] * told["action"] / 2
    reach = 1 + (scale * 8).floor() * (1 if is_causal else 2)
    position = torch.arange(LENGTH)
    seen = (position + 1).clamp_max(8)
    if not is_causal:
        seen = seen + (LENGTH - 1 - position).clamp_max(7)
    features = torch.stack([scale, reach.minimum(seen).log(), (output.norm(dim=-1) / size).log(), match], -1)
    agree = told["next_state"] == module.refiner.discretize(features)
    # A value on the edge of a bin may fall on either side
    assert agree.float().mean() > 0.99
    assert len(told["next_state"].unique()) > 20
