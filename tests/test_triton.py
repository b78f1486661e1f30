"""The fused backend against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from test_attention import DIFFERENTIABLE, Case, cases, examples, to
from torch import Tensor

from hf_focus import FocusOutput, focus_attention
from hf_focus.attention import keep_problems
from hf_focus.band_mask import BandMask
from hf_focus.errors import FocusConfigError, FocusError
from hf_focus.problem import FocusProblem

pytest.importorskip("triton", reason="triton is not installed")

from hf_focus import triton_backend
from hf_focus.triton_backend import refusal
from hf_focus.triton_configs import FORWARD, INTERPRETER, Chip, Config, backward_config, forward_configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_backend.INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

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


def error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1)).item()


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


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        x = empty(*shape, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


def among_nans(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor, which holds NaN before and after every row and column."""
    return torch.nn.functional.pad(x.transpose(1, 2), (3, 3, 0, 0, 3, 20), value=float("nan"))[..., 3:-3].transpose(
        1, 2
    )[:, :, 3:-20]


@pytest.fixture(params=[False, True], ids=["reloaded", "resident"])
def resident(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a GPU the problem decides."""
    monkeypatch.setattr(triton_backend, "INTERPRETER", INTERPRETER._replace(resident=request.param))
    return request.param


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
    "groups of 4": replace(BASE, groups=4),
    "symmetric": with_options(replace(BASE, num_keys=21), is_causal=False),
    "queries beyond the keys": with_options(BASE, query_offset=30),
    "queries before the keys": with_options(BASE, query_offset=-12, is_causal=False),
    "bool mask of each head": replace(BASE, mask="bool", bias=True),
    "additive mask, two rows, two groups": replace(BASE, batch=2, kv_heads=2, mask="additive"),
    "left padding": replace(BASE, batch=2, mask="padding"),
    "soft cap": with_options(replace(BASE, bias=True), softcap=1.5),
    "one iteration": with_options(BASE, max_iterations=1),
    "ten iterations": with_options(BASE, max_iterations=10, base_threshold=0.0),
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
    case = decided(with_options(replace(BASE, readout=readout), **options))
    # Some stop early, and not all
    assert assert_equals_reference(case).iterations.unique().numel() > 1


def test_keys_and_values_stay(resident: bool) -> None:
    case = with_options(replace(BASE, length=40, num_keys=60, mask="padding"), base_threshold=0.1)
    assert_equals_reference(decided(case))


@pytest.mark.parametrize("resident", [True], indirect=True, ids=["resident"])
def test_mask_as_a_band_of_packed_sequences(resident: bool) -> None:
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


def test_a_nan_stays_with_the_queries_that_see_it() -> None:
    arguments = on_device(replace(BASE, batch=2).arguments())
    arguments["query"][0, 1, 3, 0] = float("nan")
    output = solve(arguments, "triton").output
    assert output[0, 1, 3].isnan().all()
    assert output.isnan().sum() == output.shape[-1]


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


def test_decoding_is_the_last_query_of_many() -> None:
    arguments = on_device(replace(BASE, mask="padding").arguments())
    many = solve(arguments, "triton")
    names = ("query", "span", "temperature", "readout_weights")
    one = solve(arguments, "triton", **{name: arguments[name][:, :, -1:] for name in names})
    for alone, among in zip(one, many, strict=True):
        torch.testing.assert_close(alone, among[:, :, -1:], rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for() -> None:
    arguments = on_device(BASE.arguments())
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


def make(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> FocusProblem:
    with keep_problems() as kept:
        focus_attention(**on_device(case.arguments(), dtype) | changes, backend="blocked")
    return kept[0]


def test_scratch_does_not_grow_with_the_sequence() -> None:
    sizes = {}
    for length in (2_000, 6_000):
        p = make(replace(BASE, length=length, num_keys=length))
        wanted = {"query", "key"}
        iterations = torch.ones(p.query.shape[:3], dtype=torch.int64, device=DEVICE)
        arguments, programs = triton_backend.backward_arguments(p, iterations, p.query, wanted, Config(16, 32, 4))
        assert arguments["d_value"] is None
        sizes[length] = arguments["scratch"].numel(), programs
    assert sizes[2_000] == sizes[6_000]


def test_nothing_kept_for_backward_grows_with_iterations() -> None:
    sizes = []
    for iterations in (1, 8):
        case = with_options(replace(BASE, readout=False), max_iterations=iterations)
        arguments = on_device(case.arguments())
        arguments["query"].requires_grad_()
        sizes.append(0)

        def pack(x: Tensor) -> Tensor:
            sizes[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            solve(arguments, "triton")
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, ["torch.bfloat16", "the query is torch.float64"]),
        ({"dim": 300, "value_dim": 16}, ["up to 256", "this is 300"]),
        ({"dim": 160, "value_dim": 16}, ["`query.shape[-1]` got 160", "up to 128 in float32"]),
        ({"dim": 16, "value_dim": 257}, ["up to 256", "this is 257"]),
        ({"max_span": 4000, "num_keys": 9000}, ["`max_span` got 4000", "about 2,500"]),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    dtype = changes.get("dtype", torch.float32)
    case = replace(BASE, **{name: value for name, value in changes.items() if name != "dtype"})
    with pytest.raises(FocusConfigError) as error:
        solve(to(case.arguments(), dtype), "triton")
    assert all(word in str(error.value) for word in ("`backend`", "triton", *words))


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


def test_refuses_what_depends_on_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make(BASE)
    assert refusal(p, False) is None
    assert refusal(p, True) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert refusal(p, False) is None
        assert "use_deterministic_algorithms" in refusal(p, True)
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "triton", None)
        assert "pip install triton" in refusal(p, False)
    mixed = replace(p, value=p.value.half())
    assert "`value.dtype` got torch.float16" in refusal(mixed, False)
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_backend, "INTERPRETED", False)
        assert "`query.device` got 'cpu'" in refusal(p, False)


def test_refuses_a_second_derivative() -> None:
    arguments = on_device(BASE.arguments())
    query = arguments["query"].requires_grad_()
    with pytest.raises(FocusError, match="second derivative"):
        torch.autograd.grad(solve(arguments, "triton").output.sum(), query, create_graph=True)


def test_configurations_fit() -> None:
    """Spans up to 1,024 have one, whatever the head size; 16-bit types keep on chip what fits."""
    on_chip = {(span, dim) for span in (1, 64, 256) for dim in (32, 64, 96, 128)} | {(512, 32), (512, 64)}
    hopper, older = Chip(227 * 1024, True), Chip(163 * 1024, False)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (32, 64, 96, 128, 256) if dtype == torch.bfloat16 else (32, 64, 96, 128):
            for span in (1, 64, 256, 512, 1024):
                shape = {"length": 2, "num_keys": 3000, "dim": dim, "value_dim": dim, "max_span": span, "kv_heads": 1}
                p = make(Case(groups=1, **shape), dtype)
                best = forward_configs(p, hopper)[0]
                assert best.resident == (dtype == torch.bfloat16 and (span, dim) in on_chip)
                assert best.tiles(p) * best.block_k >= best.block_q + span - 1
                assert backward_config(p, hopper).block_q >= 16
                assert not any(config.resident for config in forward_configs(p, older))
    assert all(config.block_q >= 16 and config.block_k >= 16 for config in FORWARD)


def test_empty_problems() -> None:
    p = make(BASE)
    empty = {name: getattr(p, name)[:0] for name in ("query", "key", "value", "span", "sharpness", "readout_weights")}
    result = triton_backend.solve(replace(p, **empty))
    assert result.output.shape == (0, *p.query.shape[1:3], p.value.shape[-1])


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Without the GPU; and K and V are read before the iterations, not in them."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton cannot compile for NVIDIA GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, program, "64", "64"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Two tiles of each, and the query; in the loop only F
    assert found["tiles"] == 2
    assert found["loads_before_loop"] == 2 * 2 + 1
    assert found["loads_in_loop"] == 1
    assert max(found[name] for name in found if name.endswith("shared")) <= 227 * 1024
