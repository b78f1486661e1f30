"""What holds for a branch with any settings: causality, batches, caches, precisions, memory."""

import copy
from typing import Any

import pytest
import torch
from branch_runs import assert_acts, run
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
)

from hf_focus import FocusConfig
from hf_focus.branch import FocusBranch

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
