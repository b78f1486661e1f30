"""The refiner learns: from rewards, from what comes later, and from the loss."""

import pytest
import torch
from helpers import assert_same_buffers, buffers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_refiners import ACTIONS, STATES, assert_close_buffers, random_refiner, random_step
from torch import Tensor

from hf_focus import Refiner
from hf_focus.rewards import saved_loss


def test_it_learns() -> None:
    """The best action of a state, from rewards alone: another one for every state, and the states matter later too."""
    torch.manual_seed(0)
    refiner = Refiner(STATES, ACTIONS, alpha=0.3, gamma=0.5, epsilon=0.3).train()
    best = torch.arange(STATES) % ACTIONS
    for _ in range(300):
        state = torch.randint(STATES, (64,))
        action = refiner.choose_action(state)
        reward = 1 - (action - best[state]).abs() / ACTIONS + 0.1 * torch.randn(64)
        refiner.update(state, action, reward, torch.randint(STATES, (64,)))
    assert torch.equal(refiner.eval().choose_action(torch.arange(STATES)), best)
    # The best reward now, and half of the best reward of the next step, and so on: 1 / (1 - 0.5)
    torch.testing.assert_close(refiner.table.amax(-1), torch.full((STATES,), 2.0), rtol=0.1, atol=0)


def test_it_learns_what_comes_later() -> None:
    """An action that pays nothing now and leads to a state that pays wins with a discount near 1 only."""
    chosen = {}
    for gamma in (0.0, 0.9):
        torch.manual_seed(0)
        refiner = Refiner(2, 2, alpha=0.2, gamma=gamma, epsilon=0.5).train()
        for _ in range(400):
            # In state 0, action 0 pays 0.5 and stays, action 1 pays nothing and leads to 1; state 1 pays 1 and stays
            state = torch.randint(2, (32,))
            action = refiner.choose_action(state)
            reward = torch.where(state == 1, 1.0, 0.5 * (1 - action))
            refiner.update(state, action, reward, torch.maximum(state, action))
        chosen[gamma] = refiner.eval().choose_action(torch.tensor([0])).item()
    assert chosen == {0.0: 0, 0.9: 1}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), slope=st.floats(-1e4, 1e4).filter(lambda x: abs(x) > 1e-4))
def test_reward_of_the_loss_is_what_the_correction_saved(seed: int, slope: float) -> None:
    """Of a loss that is linear in the span, the reward is exact, in units of the mean size of gradient · span."""
    step = random_step(seed)
    noise = torch.Generator().manual_seed(seed)
    predicted, slopes = torch.rand(step["state"].shape, generator=noise), torch.randn(step["state"].shape)
    refiner, slow = random_refiner(seed).train(), random_refiner(seed)
    scale = (predicted * refiner.action_to_span_scale(step["action"])).requires_grad_()
    entries = {name: step[name] for name in ("state", "action", "features", "valid")}
    used = refiner.learn(scale, saved_loss, scale=scale, predicted=predicted, **entries)
    assert torch.equal(used, scale)
    (slope * slopes * used).sum().backward()
    assert torch.equal(scale.grad, slope * slopes)
    refiner.finish_step()

    def loss(span: Tensor) -> Tensor:
        return slope * slopes * span

    saved = loss(predicted) - loss(scale.detach())
    unit = (loss(predicted).abs() * step["valid"]).sum() / step["valid"].sum()
    slow.update(reward=saved / unit, **entries)
    assert_close_buffers(refiner, slow)


@pytest.mark.parametrize("helps", [True, False])
def test_it_learns_what_lowers_the_loss(helps: bool) -> None:
    """Shorter spans lower the loss: the first action wins. They raise it: the last one, no correction."""
    refiner = Refiner(STATES, ACTIONS, epsilon=0.5).train()
    features, valid = torch.randn(64, 4), torch.ones(64, dtype=torch.bool)
    predicted = torch.full((64,), 0.5)
    torch.manual_seed(0)
    for _ in range(50):
        state, action = refiner(features)
        scale = (predicted * refiner.action_to_span_scale(action)).requires_grad_()
        entries = {"state": state, "action": action, "features": features, "valid": valid}
        used = refiner.learn(scale, saved_loss, scale=scale, predicted=predicted, **entries)
        (used if helps else -used).sum().backward()
        refiner.finish_step()
    best = refiner.choose_action(refiner.discretize(features), explore=False)
    assert (best == (0 if helps else ACTIONS - 1)).all()


def test_without_a_gradient_the_loss_teaches_nothing() -> None:
    refiner = random_refiner().train()
    before, step = buffers(refiner), random_step()
    scale = torch.rand(step["state"].shape, requires_grad=True)
    entries = {"scale": scale, "predicted": scale, **{name: step[name] for name in ("state", "action", "features")}}
    nothing = torch.zeros_like(step["valid"])
    refiner.learn(scale, saved_loss, valid=nothing, **entries).sum().backward()
    refiner.eval().learn(scale, saved_loss, valid=step["valid"], **entries).sum().backward()
    with torch.no_grad():
        refiner.train().learn(scale, saved_loss, valid=step["valid"], **entries)
    refiner.finish_step()
    assert_same_buffers(refiner, before)
