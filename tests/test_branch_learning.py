"""Every part of FocusA that should learn does: weights, the predictor, the refiner."""

import copy

import pytest
import torch
from branch_runs import observed, run
from helpers import DIM, HEADS, VALUE_DIM, branch, branch_inputs, buffers
from torch import Tensor, nn

from hf_focus import FocusConfig
from hf_focus.branch import FocusBranch


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
    teacher = branch(refiner=False, base_threshold=0.0, max_iterations=2, initial_span=0.5)
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


@pytest.mark.parametrize(("wanted", "initial"), [("short", 0.5), ("long", 0.5), ("long", FocusConfig().initial_span)])
def test_predictor_learns_how_far_to_look(wanted: str, initial: float) -> None:
    """From the loss alone: to be the own value asks for a short span, to be the mean of eight for a long one."""
    module = branch(refiner=False, temperature="seed", max_iterations=1, initial_span=initial)
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
