"""The fused backend against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, cases, examples, to
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import (
    BASE,
    DEVICE,
    error,
    nothing_is_zero_by_luck,  # noqa: F401 - a fixture of every test
    on_device,
    plateau_kernel,
    solve,
    solve_with_gradients,
    with_options,
)

from hf_focus import FocusOutput, triton_backend
from hf_focus.band_mask import BandMask
from hf_focus.triton_configs import INTERPRETER


def is_decided(arguments: dict[str, Any], result: FocusOutput) -> bool:
    """Whether no stop, and no count of covered keys, would turn for an error of a float32."""
    defaults = {"base_threshold": 1e-4, "coverage_threshold": 0.01}
    for nudge in (1 - 1e-4, 1 + 1e-4):
        nudged = solve(arguments, "reference", **{k: arguments.get(k, x) * nudge for k, x in defaults.items()})
        if not (torch.equal(nudged.iterations, result.iterations) and torch.equal(nudged.coverage, result.coverage)):
            return False
    return True


def decided(case: Case) -> Case:
    """The case with the first numbers that leave no decision to rounding."""
    for seed in range(100):
        arguments = to(replace(case, seed=seed).arguments(), torch.float64)
        if is_decided(arguments, solve(arguments, "reference")):
            return replace(case, seed=seed)
    raise AssertionError(f"100 problems like {case} hang on rounding")


def assert_equals_reference(case: Case) -> FocusOutput:
    """All outputs and gradients in float32 against the reference in float64 on the same numbers.

    Additive feedback magnifies rounding, so what the reference itself loses in float32 sets the tolerance.
    """
    arguments = on_device(case.arguments())
    exact = to(arguments, torch.float64)
    expected, wanted = solve_with_gradients(exact, "reference")
    rounded, rounded_grads = solve_with_gradients(arguments, "reference")
    result, grads = solve_with_gradients(arguments, "triton")
    assert torch.equal(result.iterations, expected.iterations)
    torch.testing.assert_close(result.coverage, expected.coverage.float(), rtol=0, atol=1e-6)
    pairs = {f"gradient of {k}": (grads[k], rounded_grads[k], wanted[k]) for k in grads}
    pairs |= {k: tuple(getattr(x, k) for x in (result, rounded, expected)) for k in ("output", "entropy")}
    for name, (ours, theirs, truth) in pairs.items():
        assert ours.isfinite().all(), name
        assert error(ours, truth) < max(1e-5, 10 * error(theirs, truth)), name
    return result


@given(cases(longest=30, widest=24))
# Interpreted examples are too slow to be shrunk
@settings(examples(3), phases=[Phase.explicit, Phase.generate])
def test_equals_reference(case: Case) -> None:
    # A sum of two dimensions is often nearly nothing, and then its direction is rounding
    case = replace(case, dim=case.dim + 6, value_dim=case.value_dim + 5)
    exact = to(case.arguments(), torch.float32)
    exact = to(exact, torch.float64)
    assume(is_decided(exact, solve(exact, "reference")))
    assert_equals_reference(case)


CASES = {
    "decode": replace(BASE, length=1, mask="bool", bias=True),
    "decode, F the identity, D != Dv": replace(BASE, length=1, learned=False, dim=40, value_dim=24),
    "decode, symmetric, additive": with_options(
        replace(BASE, length=1, mask="additive", readout=False), is_causal=False, query_offset=9, feedback="additive"
    ),
    "fewer keys than the span": replace(BASE, length=7, num_keys=9),
    "span 1": replace(BASE, max_span=1, ramp=1),
    "span 0": replace(BASE, span="zero", shared_span=True),
    "D 40, Dv 24": replace(BASE, dim=40, value_dim=24, learned=False),
    "D 20, Dv 70": replace(BASE, dim=20, value_dim=70),
    "identity F, one padding": replace(BASE, dim=20, value_dim=30, learned=False),
    # One block of queries: the other cases have two
    "groups of 4": replace(BASE, groups=4, length=13),
    "symmetric": with_options(replace(BASE, num_keys=21), is_causal=False),
    "queries beyond the keys": with_options(BASE, query_offset=30),
    "queries before the keys": with_options(BASE, query_offset=-12, is_causal=False),
    "bool mask of each head": replace(BASE, mask="bool", bias=True),
    "additive mask, two rows, two groups": with_options(
        replace(BASE, batch=2, kv_heads=2, mask="additive", max_span=9), max_iterations=2
    ),
    "left padding": replace(BASE, batch=2, groups=1, mask="padding"),
    "soft cap": with_options(replace(BASE, bias=True), softcap=1.5),
    "one iteration": with_options(BASE, max_iterations=1),
    "rotated": replace(BASE, rotated=True, batch=2),
    "rotated, D 20, Dv 70": replace(BASE, rotated=True, dim=20, value_dim=70),
    "decode, rotated": replace(BASE, rotated=True, length=1, batch=2, dim=20, seed=5),
    "ten iterations": with_options(replace(BASE, groups=1), max_iterations=10, base_threshold=0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_table(name: str) -> None:
    assert_equals_reference(decided(CASES[name]))


@pytest.mark.parametrize("readout", [False, True], ids=["last", "mixture"])
@pytest.mark.parametrize("stop", ["absolute", "relative"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchored"])
@pytest.mark.parametrize("feedback", ["normalized", "additive"])
def test_every_form(feedback: str, anchored: bool, stop: str, readout: bool) -> None:
    options = {"feedback": feedback, "anchored": anchored, "stop": stop, "base_threshold": 0.15, "max_iterations": 4}
    # One head: that heads are told apart is in the table
    case = decided(with_options(replace(BASE, groups=1, readout=readout), **options))
    # Some stop early, and not all
    assert assert_equals_reference(case).iterations.unique().numel() > 1


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "symmetric"])
def test_tiles_within_all_spans(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the span mask is 1 everywhere it is not worked out: tiles before, on and behind such a plateau, masked."""
    monkeypatch.setattr(triton_backend, "INTERPRETER", INTERPRETER._replace(block_k=16))
    case = replace(BASE, groups=1, length=40, num_keys=90, max_span=80, span="wide", mask="padding", bias=True)
    assert_equals_reference(decided(with_options(case, is_causal=is_causal)))


@given(
    start=st.integers(0, 9),
    missing=st.integers(-1, 1),
    first=st.integers(-5, 2),
    more=st.integers(0, 3),
    spare=st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
    max_span=st.sampled_from([5, 30]),
    is_causal=st.booleans(),
)
@settings(examples(80))
def test_plateau(
    start: int, missing: int, first: int, more: int, spare: float, max_span: int, is_causal: bool
) -> None:
    """Exactly the tiles of 4 keys that all exist, each nearer to every query than all spans and the longest one."""
    high, first = start + 4 - missing, start + 3 + first
    distance = torch.arange(first, first + more + 1)[:, None] - torch.arange(start, start + 4)
    narrowest = distance.abs().max().item() + spare
    found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    plateau_kernel[(1,)](found, start, high, first, first + more, narrowest, max_span, is_causal, 4)
    near = distance.abs().max() < min(narrowest, max_span) and (distance.min() >= 0 or not is_causal)
    assert found.item() == (near and missing <= 0)


def test_mask_as_a_band_of_packed_sequences() -> None:
    """Packed = separate; and only the part of the mask near the diagonal is ever read."""
    case = replace(BASE, length=34, num_keys=34, max_span=9, ramp=3)
    arguments = on_device(case.arguments())
    document = (torch.arange(34, device=DEVICE) >= 15).int()
    mask = (document[:, None] == document)[None, None]
    packed = solve(arguments, "triton", attention_mask=mask)
    for part in (slice(0, 15), slice(15, 34)):
        tensors = {k: v[:, :, part] for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim > 2}
        tensors |= {k: arguments[k] for k in ("feedback_matrix", "mix", "gain")}
        alone = solve(arguments, "triton", **tensors)
        for one, other in zip(alone, packed, strict=True):
            torch.testing.assert_close(one, other[:, :, part])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_lazy_mask_is_read_as_a_band(is_causal: bool) -> None:
    """Left padding, and two sequences in one row, that no tensor holds."""

    def visible(batch: Tensor, head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return (queries // 9 == keys // 9) & ((keys <= queries) | (not is_causal))

    case = with_options(replace(BASE, batch=2, length=21, num_keys=21, max_span=6, ramp=3), is_causal=is_causal)
    arguments = on_device(case.arguments())
    padding = torch.arange(21, device=DEVICE) >= torch.tensor([[4], [0]], device=DEVICE)
    mask = BandMask(visible, 2, 21, 21, padding=padding, device=DEVICE)
    wanted, wanted_gradients = solve_with_gradients({**arguments, "attention_mask": mask.dense()}, "reference")
    mask._memory.clear()
    found, gradients = solve_with_gradients({**arguments, "attention_mask": mask}, "triton")
    assert not mask._memory, "the whole mask was made"
    for name in ("output", "entropy", "iterations"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_decoding_is_the_last_query_of_many() -> None:
    arguments = on_device(replace(BASE, mask="padding").arguments())
    many = solve(arguments, "triton")
    names = ("query", "span", "temperature", "readout_weights")
    one = solve(arguments, "triton", **{name: arguments[name][:, :, -1:] for name in names})
    for alone, among in zip(one, many, strict=True):
        torch.testing.assert_close(alone, among[:, :, -1:], rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for() -> None:
    arguments = on_device(replace(BASE, groups=1).arguments())
    result, full = solve(arguments, "triton", need_statistics=False), solve(arguments, "triton")
    assert result.entropy is None
    assert result.coverage is None
    assert torch.equal(result.output, full.output)
    arguments["span"].requires_grad_()
    result = solve(arguments, "triton")
    assert not any(x.requires_grad for x in result[1:])
    wanted = solve_with_gradients(arguments, "triton")[1]["span"]
    weight = torch.randn(result.output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (grad,) = torch.autograd.grad((result.output * weight.to(result.output)).sum(), arguments["span"])
    torch.testing.assert_close(grad, wanted)


def test_gradients_lie_in_memory_as_a_compiler_is_told() -> None:
    arguments = on_device(replace(BASE, length=5, num_keys=5, max_span=4, rotated=True).arguments())
    grads = solve_with_gradients(arguments, "triton")[1]
    assert all(grad.is_contiguous() for grad in grads.values())
