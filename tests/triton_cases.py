"""Problems for the fused backend, on a GPU where there is one; without triton, their tests are skipped."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DIFFERENTIABLE, Case, to
from torch import Tensor

from hf_focus import FocusOutput, focus_attention
from hf_focus.attention import keep_problems
from hf_focus.problem import FocusProblem

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.runtime import interpreter

from hf_focus import triton_backend
from hf_focus.triton_tiles import on_plateau

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_backend.INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)


def patch_once_a_launch() -> None:
    """Spare the interpreter half of its time: it replaces its language's functions for each launch, and, to no effect,
    again for each function that a kernel calls."""
    patch = interpreter._patch_lang

    def unless_patched(fn: Any) -> Any:
        # The language is seen under two names
        original = tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load)
        return patch(fn) if original else interpreter._LangPatchScope()

    interpreter._patch_lang = unless_patched


# Neither name is public: without them the tests are slower
if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
    patch_once_a_launch()

BASE = Case(seed=4, batch=1, kv_heads=1, length=21, num_keys=37, dim=16, value_dim=16, max_span=20, ramp=6)


def with_options(case: Case, **options: Any) -> Case:
    return replace(case, options=(*case.options, *options.items()))


def on_device(arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    moved = to(arguments, dtype)
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in moved.items()}


def solve(arguments: dict[str, Any], name: str, **changes: Any) -> FocusOutput:
    return focus_attention(**arguments | changes, backend=name)


def solve_with_gradients(arguments: dict[str, Any], name: str) -> tuple[FocusOutput, dict[str, Tensor]]:
    """The result, and gradients of a fixed random weighting of the output."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items() if k in DIFFERENTIABLE}
    result = solve(arguments, name, **leaves)
    weight = torch.randn(result.output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    loss = (result.output * weight.to(result.output)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return result, {
        k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), grads, strict=True)
    }


def error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1)).item()


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        x = empty(*shape, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


def make(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> FocusProblem:
    with keep_problems() as kept:
        focus_attention(**on_device(case.arguments(), dtype) | changes, backend="blocked")
    return kept[0]


@triton.jit
def plateau_kernel(
    found, start, high, first, last, narrowest, MAX_SPAN: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_K: tl.constexpr
) -> None:
    """`on_plateau` of one tile, 0 or 1."""
    tl.store(found, on_plateau(start, high, first, last, narrowest, MAX_SPAN, CAUSAL, BLOCK_K).to(tl.int32))
