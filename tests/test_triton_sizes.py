"""The fused backend at sizes of real models, on a GPU: several blocks and tiles, each configuration, 16 bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, to
from triton_cases import DEVICE, error, make, on_device, solve, solve_with_gradients, with_options

from hf_focus import triton_backend
from hf_focus.triton_configs import Sizes, forward_configs

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU, and the interpreter is too slow")

LLAMA = with_options(
    Case(seed=1, kv_heads=2, groups=2, length=700, num_keys=700, dim=64, value_dim=64, max_span=256, ramp=32),
    base_threshold=0.0,
)
SIZES = {
    "as in Llama": replace(LLAMA, rotated=True, batch=2, mask="padding"),
    "heads of 128": replace(LLAMA, dim=128, value_dim=128),
    "heads of 96": replace(LLAMA, dim=96, value_dim=96, length=300, num_keys=300),
    "short spans": replace(LLAMA, max_span=32, ramp=2),
    "span 1,024": replace(LLAMA, max_span=1024, length=1500, num_keys=1500, kv_heads=1),
    "a chunk after a cache": replace(LLAMA, length=150, num_keys=900),
    "symmetric": with_options(replace(LLAMA, mask="bool", bias=True), is_causal=False),
    "decode": replace(LLAMA, length=1, batch=3, rotated=True),
    "decode, heads of 128": replace(LLAMA, length=1, batch=3, dim=128, value_dim=128, mask="padding"),
}
# Of the norm of the exact result: inputs are rounded to 8, 11 and 24 bits, F's products once an iteration
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def scaled(case: Case) -> dict[str, Any]:
    """A feedback matrix that keeps the length of a vector, as a trained one nearly does."""
    arguments = case.arguments()
    arguments["feedback_matrix"] /= case.dim**0.5
    return arguments


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    arguments = on_device(scaled(SIZES[name]), dtype)
    expected, wanted = solve_with_gradients(to(arguments, torch.float64), "reference")
    result, gradients = solve_with_gradients(arguments, "triton")
    found = {"output": error(result.output, expected.output), "entropy": error(result.entropy, expected.entropy)}
    found |= {f"gradient of {k}": error(gradients[k], wanted[k]) for k in wanted}
    print(name, dtype, {k: f"{x:.1e}" for k, x in found.items()})
    assert torch.equal(result.iterations, expected.iterations)
    wrong = {k: x for k, x in found.items() if not x < TOLERANCES[dtype] * (2 if k.startswith("gradient") else 1)}
    assert not wrong


@pytest.mark.parametrize("name", ["as in Llama", "heads of 128", "short spans", "symmetric"])
def test_every_configuration_is_the_same_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_device(scaled(SIZES[name]), torch.bfloat16)
    problem = make(SIZES[name], torch.bfloat16)
    results = {}
    for config in forward_configs(Sizes.of(problem), triton_backend._shared_memory(problem.query.device)):
        monkeypatch.setattr(triton_backend, "forward_configs", lambda sizes, shared_memory, config=config: [config])
        results[config] = solve(arguments, "triton")
    first, *others = results.values()
    assert others
    for other in others:
        assert torch.equal(first.iterations, other.iterations)
        torch.testing.assert_close(first.output, other.output, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(first.entropy, other.entropy, rtol=2e-2, atol=2e-2)


def test_results_are_repeatable() -> None:
    """Forward always, bit for bit: nothing races."""
    arguments = on_device(scaled(SIZES["as in Llama"]), torch.bfloat16)
    first = solve(arguments, "triton")
    for _ in range(20):
        again = solve(arguments, "triton")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_graph_can_be_captured() -> None:
    """Nothing waits for the device, once the configuration has been chosen."""
    arguments = on_device(scaled(LLAMA), torch.bfloat16)
    expected = solve(arguments, "triton").output
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = solve(arguments, "triton").output
    output.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


def test_auto_takes_it() -> None:
    arguments = on_device(scaled(LLAMA), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "forward_kernel", None)
        with pytest.raises(TypeError):
            solve(arguments, "auto")
