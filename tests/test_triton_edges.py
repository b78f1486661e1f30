"""The fused backend where numbers are extreme or missing, in half precision, and on views."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import to
from torch import Tensor
from triton_cases import (
    BASE,
    DEVICE,
    error,
    make,
    nothing_is_zero_by_luck,  # noqa: F401 - a fixture of every test
    on_device,
    solve,
    solve_with_gradients,
    with_options,
)

from hf_focus import triton_backend


def test_queries_that_see_nothing() -> None:
    arguments = on_device(replace(BASE, mask="none").arguments())
    arguments["attention_mask"] = (torch.arange(37, device=DEVICE) >= 26)[None, None, None]
    arguments["value"], arguments["query"] = (arguments[k].requires_grad_() for k in ("value", "query"))
    result = solve(arguments, "triton")
    empty, full = slice(0, 10), slice(10, None)
    for x in result[:3]:
        assert not x[:, :, empty].any()
        assert x[:, :, full].any()
    assert (result.iterations[:, :, empty] == 1).all()
    inputs = arguments["value"], arguments["query"]
    grads = torch.autograd.grad((result.output[:, :, empty] * 1e3).sum(), inputs, retain_graph=True)
    assert not any(grad.any() for grad in grads)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(result.output.sum() * 1e3, inputs))


@pytest.mark.parametrize("feedback", ["normalized", "additive"])
def test_zero_vectors_have_finite_gradients(feedback: str) -> None:
    arguments = on_device(with_options(BASE, feedback=feedback, max_iterations=6).arguments())
    for name, part in (("query", slice(0, 5)), ("key", slice(10, 30)), ("value", slice(10, 30))):
        arguments[name][:, :, part] = 0
    result, grads = solve_with_gradients(arguments, "triton")
    assert result.output.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_scores_stay_finite(dtype: torch.dtype, length: int) -> None:
    """Scores of 10⁴ and -10⁴ in one row."""
    case = with_options(replace(BASE, length=length, num_keys=21, readout=False), max_iterations=4)
    arguments = on_device(case.arguments(), dtype)
    arguments["key"] = arguments["key"].sign()
    arguments["query"] = arguments["key"][:, :, -length:].repeat_interleave(2, dim=1) * 2560
    arguments["key"][:, :, ::2] *= -1
    arguments["scaling"] = 0.25
    expected = solve(to(arguments, torch.float64), "reference", max_iterations=1)
    result, grads = solve_with_gradients(arguments, "triton")
    assert all(x.isfinite().all() for x in (*result, *grads.values()))
    once = solve(arguments, "triton", max_iterations=1)
    torch.testing.assert_close(once.entropy.double(), expected.entropy, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "padding"])
@pytest.mark.parametrize("length", [1, 21])
def test_a_nan_stays_with_the_queries_that_see_it(length: int, mask: str) -> None:
    arguments = on_device(replace(BASE, batch=2, length=length, num_keys=21, mask=mask).arguments())
    arguments["query"][0, 1, -1, 0] = float("nan")
    if mask != "none":
        # It sees its own key
        arguments["attention_mask"][..., -1] = 0.0 if mask == "additive" else True
    output = solve(arguments, "triton").output
    assert output[0, 1, -1].isnan().all()
    assert output.isnan().sum() == output.shape[-1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_wrong_key_stays_out_of_sight(wrong: float) -> None:
    """Forward, of queries before it, and of those whose span ends before it."""
    arguments = on_device(replace(BASE, length=21, num_keys=21, max_span=4, ramp=1).arguments())
    arguments["key"][0, 0, 10, 0] = wrong
    output = solve(arguments, "triton").output
    assert output[:, :, :10].isfinite().all()
    assert output[:, :, 14:].isfinite().all()
    assert not output[:, :, 10].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("length", [1, 21])
def test_half_precision(dtype: torch.dtype, tolerance: float, length: int) -> None:
    case = with_options(replace(BASE, length=length, mask="padding"), base_threshold=0.0)
    arguments = on_device(case.arguments(), dtype)
    expected, wanted = solve_with_gradients(to(arguments, torch.float64), "reference")
    result, grads = solve_with_gradients(arguments, "triton")
    assert result.output.dtype == dtype
    torch.testing.assert_close(result.output.double(), expected.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert error(grad, wanted[name]) < 2 * tolerance, name


def among_nans(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor, which holds NaN before and after every row and column."""
    return torch.nn.functional.pad(x.transpose(1, 2), (3, 3, 0, 0, 3, 20), value=float("nan"))[..., 3:-3].transpose(
        1, 2
    )[:, :, 3:-20]


@pytest.mark.parametrize("length", [1, 21])
def test_views_are_read_in_place(length: int) -> None:
    arguments = on_device(replace(BASE, length=length, mask="additive", bias=True).arguments())
    expected, wanted = solve_with_gradients(arguments, "triton")
    seen: list[dict[str, Any]] = []
    given = triton_backend.shared_arguments
    for name in ("query", "key", "value", "readout_weights", "attention_mask", "position_bias"):
        arguments[name] = among_nans(arguments[name])
    assert not any(arguments[name].is_contiguous() for name in ("query", "key", "value", "readout_weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "shared_arguments", lambda p: seen.append(given(p)) or seen[-1])
        result, grads = solve_with_gradients(arguments, "triton")
    names = {"readout": "readout_weights", "mask": "attention_mask", "bias": "position_bias"}
    names |= {name: name for name in ("query", "key", "value")}
    for call in seen:
        for there, here in names.items():
            assert call[there].data_ptr() == arguments[here].data_ptr()
    assert len(seen) == 2
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_empty_problems() -> None:
    p = make(BASE)
    empty = {name: getattr(p, name)[:0] for name in ("query", "key", "value", "span", "sharpness", "readout_weights")}
    result = triton_backend.solve(replace(p, **empty))
    assert result.output.shape == (0, *p.query.shape[1:3], p.value.shape[-1])
