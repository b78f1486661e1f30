"""One update of the refiner an optimizer step, however the backward passes come."""

import copy

import pytest
import torch
from helpers import assert_same_buffers, buffers
from small_refiners import SAVED, random_refiner, random_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_focus import Refiner

SHAPE = (2, 3, 5)


class Learner(nn.Module):
    """The least module whose backward pass teaches a refiner: `random_step` of the number in `x`'s first place."""

    def __init__(self, refiner: Refiner) -> None:
        super().__init__()
        self.refiner = refiner
        self.weight = nn.Parameter(torch.ones(SHAPE))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.refiner.begin(self.weight)
        self.seen.append(self.refiner.table.clone())
        return self.refiner.learn((x * self.weight).sin(), **random_step(int(x.detach().flatten()[0])))


def numbered(seed: int) -> Tensor:
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0] = seed
    return x.requires_grad_()


def joined(*seeds: int) -> dict[str, Tensor]:
    """The steps of all `seeds` as one."""
    steps = [random_step(seed) for seed in seeds]
    return {name: torch.cat([step[name] for step in steps]) for name in steps[0]}


def saved(refiner: Refiner) -> dict[str, Tensor]:
    """What a checkpoint holds; the refiner itself is left as it is."""
    return {name: value.clone() for name, value in copy.deepcopy(refiner).state_dict().items()}


FORWARDS = {
    "plain": lambda learner, x: learner(x),
    "reentrant": lambda learner, x: checkpoint(learner, x, use_reentrant=True),
    "not reentrant": lambda learner, x: checkpoint(learner, x, use_reentrant=False),
}
# How training loops clear gradients: where, and to what
CLEARED = {
    "after the step": (False, True),
    "before the backward pass": (True, True),
    "to zeros": (False, False),
    "to zeros, before the backward pass": (True, False),
}


@pytest.mark.parametrize("cleared", CLEARED)
@pytest.mark.parametrize("mode", FORWARDS)
def test_one_update_an_optimizer_step(mode: str, cleared: str) -> None:
    """Accumulated over two backward passes, the table is that of one pass with both halves."""
    forward, (late, to_none) = FORWARDS[mode], CLEARED[cleared]
    expected, learner = random_refiner(), Learner(random_refiner()).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for step in range(3):
        before = buffers(expected)
        for micro in range(2):
            x = numbered(2 * step + micro)
            learner.seen.clear()
            output = forward(learner, x)
            if late and micro == 0:
                optimizer.zero_grad(set_to_none=to_none)
            torch.testing.assert_close(output, (x * learner.weight).sin())
            output.backward(torch.ones(SHAPE))
            torch.testing.assert_close(x.grad, (x * learner.weight).cos() * learner.weight)
            # Recomputed or not, every pass of the step saw the table that the step before left
            assert all(torch.allclose(table, before["table"]) for table in learner.seen)
        optimizer.step()
        if not late:
            optimizer.zero_grad(set_to_none=to_none)
        expected.update(**joined(2 * step, 2 * step + 1))
        for name, value in saved(learner.refiner).items():
            torch.testing.assert_close(value, expected.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)
        assert learner.refiner.num_updates.item() == step


@pytest.mark.parametrize("mode", FORWARDS)
def test_a_layer_that_is_called_twice(mode: str) -> None:
    """The pass that is recomputed last sees the table of the forward pass too, and both are one step."""
    expected, learner = random_refiner(), Learner(random_refiner()).train()
    x = [numbered(seed) for seed in range(2)]
    before = expected.table.clone()
    sum(FORWARDS[mode](learner, part).sum() for part in x).backward()
    assert all(torch.equal(table, before) for table in learner.seen)
    expected.update(**joined(0, 1))
    for name, value in saved(learner.refiner).items():
        torch.testing.assert_close(value, expected.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)


def test_without_gradients_each_backward_pass_is_a_step() -> None:
    """As in sharded training, which keeps gradients elsewhere."""
    expected, learner = random_refiner(), Learner(random_refiner()).train()
    for seed in range(3):
        learner(numbered(seed)).sum().backward()
        learner.weight.grad = None
        expected.update(**random_step(seed))
    assert saved(learner.refiner).keys() == set(SAVED)
    for name, value in saved(learner.refiner).items():
        assert torch.equal(value, expected.get_buffer(name)), name


@pytest.mark.parametrize("how", ["eval", "state_dict"])
def test_nothing_is_pending_in_what_is_used_or_saved(how: str) -> None:
    expected, learner = random_refiner(), Learner(random_refiner()).train()
    learner(numbered(1)).sum().backward()
    expected.update(**random_step(1))
    if how == "eval":
        learner.eval()
    else:
        learner.state_dict()
    for name in SAVED:
        assert torch.equal(learner.refiner.get_buffer(name), expected.get_buffer(name)), name
    # And it is taken in once
    learner.train().refiner.begin(learner.weight)
    assert_same_buffers(learner.refiner.eval(), buffers(learner.refiner))
    assert learner.refiner.num_updates.item() == 1


def test_what_is_pending_goes_with_the_table_it_was_for() -> None:
    learner = Learner(random_refiner()).train()
    state = saved(learner.refiner)
    learner(numbered(1)).sum().backward()
    learner.refiner.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in saved(learner.refiner).items())


@pytest.mark.parametrize("why", ["eval", "no_grad", "frozen"])
def test_no_update(why: str) -> None:
    learner = Learner(random_refiner()).train(why != "eval")
    learner.requires_grad_(why != "frozen")
    before = saved(learner.refiner)
    with torch.set_grad_enabled(why != "no_grad"):
        output = learner(torch.ones(SHAPE))
        if output.requires_grad:
            output.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in saved(learner.refiner).items())
