"""Focus attention in 32 and 16 bits, under autocast, and with scores as large as they get."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import LARGE, both_backends, gradients, solve, to
from tiny import patched, tokens

from hf_focus import focus_attention
from hf_focus.attention import keep_problems


@both_backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("options", [{"base_threshold": 0.0}, {"base_threshold": 1e3}, {"feedback": "additive"}])
def test_lower_precision(backend: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]) -> None:
    """Decisions are far from the threshold here: nothing stops, or everything at once."""
    options = {"base_threshold": 0.0, "feedback": "normalized", **options}
    # What is compared is the arithmetic, so both sides start from the rounded numbers
    rounded = to(replace(LARGE, options=tuple(options.items())).arguments(), dtype)
    expected = solve(to(rounded, torch.float64), "reference")
    actual = solve(rounded, backend)
    assert actual.output.dtype == dtype
    seen = expected.entropy > 0
    assert torch.equal(actual.iterations[seen], expected.iterations[seen])
    torch.testing.assert_close(actual.output.double(), expected.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.entropy.double(), expected.entropy, rtol=2 * tolerance, atol=2 * tolerance)
    wanted, grads = gradients(to(rounded, torch.float64), "reference"), gradients(rounded, backend)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        error = (grad.double() - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-3)
        assert error < 2 * tolerance, name


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feedback", ["normalized", "additive"])
@pytest.mark.parametrize("mask", ["none", "additive", "padding"])
def test_extreme_scores_stay_finite(backend: str, dtype: torch.dtype, feedback: str, mask: str) -> None:
    case = replace(LARGE, length=20, num_keys=20, mask=mask, options=(("feedback", feedback), ("max_iterations", 4)))
    arguments = to(case.arguments(), dtype)
    arguments["key"] = arguments["key"].sign()
    own = arguments["key"].repeat_interleave(2, dim=1)
    # Over 16 features the own key's score is 10240 and -10240 in turn
    arguments["query"] = own * (torch.arange(20) % 2 * 5120 - 2560)[:, None].to(dtype)
    arguments["scaling"] = 0.25
    assert (arguments["query"] * own).float().sum(-1).abs().eq(4 * 10240).all()
    result = solve(arguments, backend)
    assert all(x.isfinite().all() for x in result)
    assert all(grad.isfinite().all() for grad in gradients(arguments, backend).values())


@both_backends
@pytest.mark.parametrize("readout", [True, False])
def test_backward_within_autocast(backend: str, readout: bool) -> None:
    arguments = to(replace(LARGE, readout=readout).arguments(), torch.float32)
    wanted = gradients(arguments, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(arguments, backend)
    if backend == "blocked":
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_span_in_half_precision_cuts_nothing_off(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 4200, 2, dtype=dtype) for _ in range(3))
    span = torch.full((1, 1, 4200), 4092.0 if dtype == torch.float16 else 510.0, dtype=dtype)
    arguments = {"span": span, "max_span": 4200, "ramp": 6, "max_iterations": 1}
    found = focus_attention(query, key, value, **arguments, backend="blocked").coverage
    torch.testing.assert_close(found, focus_attention(query, key, value, **arguments, backend="reference").coverage)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_changes_nothing(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 30, 8, generator=generator, requires_grad=True) for _ in range(3))
    span = torch.full((1, 2, 30), 6.0)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = focus_attention(query, key, value, span, max_span=8, ramp=2, backend=backend).output
        results.append((output, *torch.autograd.grad(output.sum(), (query, key, value))))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_gives_a_model_s_branches_one_precision(dtype: torch.dtype, use_cache: bool) -> None:
    """Rotary positions and caches leave queries, keys and values in several: fused kernels, as SDPA's, take one."""
    model, ids = patched("llama"), tokens()
    with keep_problems() as problems, torch.autocast("cpu", dtype):
        model(input_ids=ids, use_cache=use_cache)
    assert problems
    assert {x.dtype for problem in problems for x in (problem.query, problem.key, problem.value)} == {dtype}
    with keep_problems() as problems:
        model(input_ids=ids, use_cache=use_cache)
    assert {x.dtype for problem in problems for x in (problem.query, problem.key, problem.value)} == {torch.float32}
