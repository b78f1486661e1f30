"""Focus attention: the reference against brute force, the blocked path against the reference."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import LargestTensor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_focus import FocusOutput, blocked, focus_attention
from hf_focus.backends import BACKENDS as ALL_BACKENDS
from hf_focus.errors import FocusConfigError, FocusError

BACKENDS = ("reference", "blocked")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "span",
    "temperature",
    "readout_weights",
    "feedback_matrix",
    "mix",
    "gain",
    "position_bias",
)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """One random problem; its numbers come from `seed`."""

    seed: int = 0
    batch: int = 1
    kv_heads: int = 2
    groups: int = 2
    length: int = 5
    num_keys: int = 5
    dim: int = 3
    value_dim: int = 2
    max_span: int = 4
    ramp: int = 2
    span: str = "random"
    shared_span: bool = False
    mask: str = "none"
    bias: bool = False
    learned: bool = True
    readout: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `focus_attention`, in float64."""
        noise = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=noise, dtype=torch.float64)

        heads = self.kv_heads * self.groups
        options = {"max_span": self.max_span, "ramp": self.ramp, "max_iterations": 3, **dict(self.options)}
        share = torch.rand(self.batch, 1 if self.shared_span else heads, self.length, generator=noise).double()
        span = {"random": share * self.max_span, "zero": share * 0, "one": share * 0 + 1}[self.span]
        full = (self.batch, heads, self.length, self.num_keys)
        arguments = {
            "query": normal(self.batch, heads, self.length, self.dim),
            "key": normal(self.batch, self.kv_heads, self.num_keys, self.dim),
            "value": normal(self.batch, self.kv_heads, self.num_keys, self.value_dim),
            "span": span,
            "temperature": (normal(self.batch, heads, self.length) / 4).exp(),
            **options,
        }
        if self.readout:
            arguments["readout_weights"] = normal(*full[:3], options["max_iterations"]).softmax(-1)
        if self.learned:
            arguments["feedback_matrix"] = normal(heads, self.value_dim, self.dim)
            arguments["mix"] = normal(heads).sigmoid()
            arguments["gain"] = (normal(heads) / 4).exp()
        if self.bias:
            arguments["position_bias"] = normal(1, heads, self.length, self.num_keys)
        if self.mask == "bool":
            arguments["attention_mask"] = torch.rand(full, generator=noise) < 0.6
        elif self.mask == "additive":
            hidden = torch.rand(full[0], 1, *full[2:], generator=noise) < 0.3
            arguments["attention_mask"] = normal(*hidden.shape).masked_fill(hidden, torch.finfo(torch.float64).min)
        elif self.mask == "padding":
            # The first keys are padding: under a causal mask the first queries see nothing
            start = torch.randint(0, self.num_keys + 1, (self.batch, 1, 1, 1), generator=noise)
            arguments["attention_mask"] = torch.arange(self.num_keys) >= start
        return arguments


@st.composite
def cases(draw: st.DrawFn, longest: int, widest: int) -> Case:
    """Problems with up to `longest` queries and keys, and spans up to `widest`."""
    options = {
        "is_causal": draw(st.booleans()),
        "feedback": draw(st.sampled_from(["normalized", "additive"])),
        "anchored": draw(st.booleans()),
        "stop": draw(st.sampled_from(["absolute", "relative"])),
        "base_threshold": draw(st.sampled_from([0.0, 1e-4, 0.05, 0.2, 1.0])),
        "threshold_scale": draw(st.sampled_from([0.0, 0.1, 0.7])),
        "max_iterations": draw(st.integers(1, 4)),
        "coverage_threshold": draw(st.sampled_from([0.01, 0.3])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "scaling": draw(st.sampled_from([None, 0.9])),
    }
    num_keys = draw(st.integers(1, longest))
    # Of an int: keys before the queries, a static cache's empty places after them, and windows outside the keys
    options["query_offset"] = draw(st.none() | st.integers(-1, num_keys))
    return Case(
        seed=draw(st.integers(0, 10**6)),
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        length=draw(st.integers(1, longest)),
        num_keys=num_keys,
        # In one dimension a query and a fed-back output of opposite signs cancel, and the rest is rounding
        dim=draw(st.integers(2, 4)),
        value_dim=draw(st.integers(1, 5)),
        max_span=draw(st.integers(1, widest)),
        ramp=draw(st.integers(1, 5)),
        span=draw(st.sampled_from(["random", "zero", "one"])),
        shared_span=draw(st.booleans()),
        mask=draw(st.sampled_from(["none", "bool", "additive", "padding"])),
        bias=draw(st.booleans()),
        learned=draw(st.booleans()),
        readout=draw(st.booleans()),
        options=tuple(options.items()),
    )


def rms(x: list[float]) -> float:
    return math.sqrt(sum(a * a for a in x) / len(x))


def brute_update(
    first: list[float], query: list[float], output: list[float], head: int, arguments: dict[str, Any]
) -> list[float]:
    """The next query, as the docstrings say it."""
    if "feedback_matrix" in arguments:
        matrix = arguments["feedback_matrix"][head].tolist()
        fed = [sum(output[i] * matrix[i][j] for i in range(len(output))) for j in range(len(query))]
    else:
        fed = [output[j] if j < len(output) else 0.0 for j in range(len(query))]
    base = first if arguments["anchored"] else query
    if arguments["feedback"] == "additive":
        return [a + b for a, b in zip(base, fed, strict=True)]
    alpha = arguments["mix"][head].item() if "mix" in arguments else 0.5
    gain = arguments["gain"][head].item() if "gain" in arguments else 1.0
    base_size, fed_size = rms(base) or 1.0, rms(fed) or 1.0
    mixed = [(1 - alpha) * a / base_size + alpha * b / fed_size for a, b in zip(base, fed, strict=True)]
    return [x / (rms(mixed) or 1.0) * rms(first) * gain for x in mixed]


def brute_seen(b: int, h: int, t: int, arguments: dict[str, Any]) -> list[tuple[int, float]]:
    """The keys that a query sees, and what is added to their scores."""
    length, num_keys = arguments["query"].shape[2], arguments["key"].shape[2]
    offset = arguments["query_offset"]
    if offset is None:
        offset = num_keys - length if arguments["is_causal"] else 0
    span = arguments["span"][b, min(h, arguments["span"].shape[1] - 1), t].item()
    seen = []
    for s in range(num_keys):
        distance = t + offset - s
        if (arguments["is_causal"] and distance < 0) or abs(distance) >= arguments["max_span"]:
            continue
        weight = min(max((arguments["ramp"] + span - abs(distance)) / arguments["ramp"], 0.0), 1.0)
        if weight == 0:
            continue
        added = math.log(weight)
        if "attention_mask" in arguments:
            shape = (*arguments["query"].shape[:3], num_keys)
            mask = arguments["attention_mask"].expand(shape)[b, h, t, s].item()
            if mask is False or mask == torch.finfo(torch.float64).min:
                continue
            added += 0.0 if mask is True else mask
        if "position_bias" in arguments:
            added += arguments["position_bias"][0, h, t, s].item()
        seen.append((s, added))
    return seen


def brute_query(b: int, h: int, t: int, arguments: dict[str, Any]) -> tuple[list[float], float, float, int, float]:
    """Output, entropy, coverage, iterations of one query, and how far its closest decision was from the other way."""
    groups = arguments["query"].shape[1] // arguments["key"].shape[1]
    key, value = (arguments[name][b, h // groups].tolist() for name in ("key", "value"))
    first = query = arguments["query"][b, h, t].tolist()
    scaling = len(query) ** -0.5 if arguments["scaling"] is None else arguments["scaling"]
    softcap, base = arguments["softcap"], arguments["base_threshold"]
    seen = brute_seen(b, h, t, arguments)
    output, outputs, iterations, margin, running = [0.0] * len(value[0]), [], 0, math.inf, True
    entropy = coverage = 0.0
    for _ in range(arguments["max_iterations"]):
        if running:
            iterations += 1
            scores = []
            for s, added in seen:
                score = sum(a * c for a, c in zip(query, key[s], strict=True)) * scaling
                score = score if softcap is None else softcap * math.tanh(score / softcap)
                scores.append(score / arguments["temperature"][b, h, t].item() + added)
            top = max(scores, default=0.0)
            total = sum(math.exp(score - top) for score in scores)
            weights = [math.exp(score - top) / total for score in scores]
            previous = output
            pairs = [(w, value[s]) for w, (s, _) in zip(weights, seen, strict=True)]
            output = [sum((w * row[j] for w, row in pairs), 0.0) for j in range(len(output))]
            entropy = sum((-w * math.log(w) for w in weights if w > 0), 0.0)
            threshold = arguments["coverage_threshold"]
            coverage = sum(w > threshold for w in weights) / max(len(seen), 1)
            change = sum(abs(a - c) for a, c in zip(output, previous, strict=True)) / len(output)
            size = sum(map(abs, output)) / len(output)
            if arguments["stop"] == "relative" and size > 0:
                change /= size
            running = not change < base + arguments["threshold_scale"] * change
            if base > 0:
                margin = min(margin, abs(change * (1 - arguments["threshold_scale"]) - base))
            margin = min([margin, *(abs(w - threshold) for w in weights)])
            query = brute_update(first, query, output, h, arguments)
        outputs.append(output)
    if "readout_weights" in arguments:
        shares = arguments["readout_weights"][b, h, t].tolist()
        output = [sum(w * o[j] for w, o in zip(shares, outputs, strict=True)) for j in range(len(output))]
    return output, entropy, coverage, iterations, margin


def brute_force(arguments: dict[str, Any]) -> tuple[FocusOutput, float]:
    """The equations read aloud: one query at a time, in plain Python."""
    batch, heads, length = arguments["query"].shape[:3]
    rows = [brute_query(b, h, t, arguments) for b in range(batch) for h in range(heads) for t in range(length)]
    output, entropy, coverage, iterations, margins = zip(*rows, strict=True)

    def shaped(x: Any) -> Tensor:
        tensor = torch.tensor(x, dtype=torch.int64 if isinstance(x[0], int) else torch.float64)
        return tensor.view(batch, heads, length, *tensor.shape[1:])

    # Coverage is a ratio of two counts in float32
    result = FocusOutput(shaped(output), shaped(entropy), shaped(coverage), shaped(iterations))
    return result, min(margins)


def assert_same(actual: FocusOutput, expected: FocusOutput) -> None:
    assert torch.equal(actual.iterations, expected.iterations)
    torch.testing.assert_close(actual.output, expected.output, **TIGHT)
    torch.testing.assert_close(actual.entropy, expected.entropy, **TIGHT)
    torch.testing.assert_close(actual.coverage, expected.coverage, rtol=0, atol=1e-6)


def solve(arguments: dict[str, Any], backend: str, size: int | None = None, **changes: Any) -> FocusOutput:
    arguments = {**arguments, **changes}
    if size is None:
        return focus_attention(**arguments, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        parts = {name: partial(getattr(blocked, name), size=size) for name in ("solve", "differentiate")}
        patch.setitem(ALL_BACKENDS, backend, replace(ALL_BACKENDS[backend], **parts))
        return focus_attention(**arguments, backend=backend)


def gradients(arguments: dict[str, Any], backend: str, size: int | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed random weighting of the output, for every differentiable argument."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in arguments.items() if k in DIFFERENTIABLE}
    output = solve(arguments, backend, size, **leaves).output
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad((output * weight.to(output.dtype)).sum(), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), grads, strict=True)}


def assume_decided(arguments: dict[str, Any], result: FocusOutput) -> None:
    """Leave out problems with a stop decision that rounding could turn: those that a nudged threshold changes."""
    for nudge in (1 - 1e-6, 1 + 1e-6):
        nudged = solve(arguments, "reference", base_threshold=arguments["base_threshold"] * nudge)
        assume(torch.equal(nudged.iterations, result.iterations))


@given(cases(longest=6, widest=5))
@examples(250)
def test_reference_is_the_equations(case: Case) -> None:
    arguments = case.arguments()
    expected, margin = brute_force(arguments)
    assume(margin > 1e-9)
    assert_same(solve(arguments, "reference"), expected)


@given(cases(longest=40, widest=24), st.sampled_from([1, 3, 7, 16, 64]))
@examples(200)
def test_blocked_is_the_reference(case: Case, size: int) -> None:
    arguments = case.arguments()
    expected = solve(arguments, "reference")
    assume_decided(arguments, expected)
    assert_same(solve(arguments, "blocked", size), expected)


@given(cases(longest=20, widest=12), st.sampled_from([1, 3, 7, 16]))
@examples(200)
def test_blocked_gradients_are_the_references(case: Case, size: int) -> None:
    arguments = case.arguments()
    assume_decided(arguments, solve(arguments, "reference"))
    expected = gradients(arguments, "reference")
    for name, grad in gradients(arguments, "blocked", size).items():
        assert grad.shape == arguments[name].shape
        assert grad.isfinite().all(), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-9, msg=lambda x, n=name: f"{n}: {x}")


@both_backends
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("feedback", ["normalized", "additive"])
@pytest.mark.parametrize("stop", ["absolute", "relative"])
def test_gradients_are_the_finite_differences(backend: str, feedback: str, anchored: bool, stop: str) -> None:
    options = {"feedback": feedback, "anchored": anchored, "stop": stop, "base_threshold": 0.3, "threshold_scale": 0.1}
    case = Case(seed=2, groups=1, length=3, num_keys=4, bias=True, options=tuple(options.items()))
    arguments = case.arguments()
    names = [name for name in DIFFERENTIABLE if name in arguments]
    # Some queries stop, some go on, and none is near the threshold
    iterations = solve(arguments, backend).iterations
    assert iterations.min() < iterations.max()
    for nudge in (0.999, 1.001):
        assert torch.equal(iterations, solve(arguments, backend, base_threshold=0.3 * nudge).iterations)

    def output(*tensors: Tensor) -> Tensor:
        return solve(arguments, backend, **dict(zip(names, tensors, strict=True))).output

    assert torch.autograd.gradcheck(output, [arguments[name].requires_grad_() for name in names])


@given(cases(longest=20, widest=12))
@examples(150)
def test_tensor_offset_is_int_offset(case: Case) -> None:
    arguments = case.arguments()
    offset = arguments.pop("query_offset") or 0
    arguments["query_offset"] = offset
    expected = solve(arguments, "reference")
    assume_decided(arguments, expected)
    arguments["query_offset"] = torch.tensor(offset)
    for backend in BACKENDS:
        assert_same(solve(arguments, backend), expected)
    arguments["query_offset"] = offset
    wanted = gradients(arguments, "blocked")
    arguments["query_offset"] = torch.tensor(offset)
    for name, grad in gradients(arguments, "blocked").items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-7, atol=1e-9)


def to(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


LARGE = Case(seed=4, batch=2, length=70, num_keys=90, dim=16, value_dim=12, max_span=20, ramp=6, mask="padding")


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
def test_layout_in_memory_does_not_matter(backend: str) -> None:
    arguments = replace(LARGE, batch=1).arguments()
    expected, wanted = solve(arguments, backend), gradients(arguments, backend)
    for name in ("query", "key", "value", "readout_weights"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert not arguments[name].is_contiguous()
    assert_same(solve(arguments, backend), expected)
    for name, grad in gradients(arguments, backend).items():
        torch.testing.assert_close(grad, wanted[name], **TIGHT)


@both_backends
def test_expanded_inputs(backend: str) -> None:
    """One head's keys, values and span seen by all through strides of zero."""
    case = replace(LARGE, batch=1, kv_heads=1, groups=1, length=20, num_keys=20, readout=False, learned=False)
    arguments = {**case.arguments(), "temperature": None}
    arguments["query"] = torch.randn(1, 3, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = {name: arguments[name].requires_grad_() for name in ("key", "value", "span")}
    results = []
    for copied in (True, False):
        wide = {k: x.expand(1, 3, *x.shape[2:]) for k, x in leaves.items()}
        wide = {k: x.contiguous() if copied else x for k, x in wide.items()}
        output = solve(arguments, backend, **wide).output
        results.append((output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


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
@pytest.mark.parametrize("where", ["position_bias", "span"])
def test_rows_hidden_without_a_mask_are_zero(backend: str, where: str) -> None:
    """By a position bias of −inf, or by a span so far below zero that not even the own key is in it."""
    arguments = replace(LARGE, mask="none", bias=True).arguments()
    if where == "position_bias":
        arguments["position_bias"][:, :, 5] = float("-inf")
    else:
        arguments["span"][:, :, 5] = -50.0
    found = solve(arguments, backend)
    assert not found.output[:, :, 5].any()
    assert not found.entropy[:, :, 5].any()
    torch.testing.assert_close(found.output, solve(arguments, "reference").output, **TIGHT)
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


def test_integers_are_no_mask() -> None:
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(FocusConfigError, match=r"`attention_mask` got torch.int64; accepted: torch.bool"):
        focus_attention(query, query, query, torch.zeros(1, 2, 5), attention_mask=torch.zeros(1, 1, 5, 5).long())


@both_backends
@pytest.mark.parametrize("batch_or_length", ["batch", "length"])
def test_nothing_gives_nothing(backend: str, batch_or_length: str) -> None:
    sizes = (0, 5) if batch_or_length == "batch" else (2, 0)
    query = torch.zeros(sizes[0], 2, sizes[1], 4)
    key = torch.zeros(sizes[0], 2, 5, 4)
    span = torch.zeros(sizes[0], 2, sizes[1])
    assert focus_attention(query, key, key, span, backend=backend).output.shape == query.shape


@both_backends
@pytest.mark.parametrize("name", ["query", "key", "value", "span"])
def test_nan_stays_where_it_is_put(backend: str, name: str) -> None:
    """In its row of the batch and its head; a NaN query spoils no other query."""
    arguments = replace(LARGE, batch=2, mask="none").arguments()
    clean = solve(arguments, backend).output
    spoilt = {**arguments, name: arguments[name].clone()}
    spoilt[name][0, 0, 3] = float("nan")
    output = solve(spoilt, backend).output
    groups = clean.shape[1] // arguments[name].shape[1]
    assert output[0, :groups].isnan().any()
    torch.testing.assert_close(output[1], clean[1], **TIGHT)
    torch.testing.assert_close(output[0, groups:], clean[0, groups:], **TIGHT)
    if name in ("query", "span"):
        others = torch.arange(clean.shape[2]) != 3
        torch.testing.assert_close(output[0, :, others], clean[0, :, others], **TIGHT)


@both_backends
@pytest.mark.parametrize("stop", ["absolute", "relative"])
def test_queries_that_see_nothing(backend: str, stop: str) -> None:
    """They give zeros and stop at once, and gradients into them of any size do no harm."""
    arguments = to(replace(LARGE, options=(("stop", stop),)).arguments(), torch.float32)
    arguments["attention_mask"] = (torch.arange(90) >= 40)[None, None, None]
    arguments["value"] = arguments["value"].requires_grad_()
    arguments["query"] = arguments["query"].requires_grad_()
    result = solve(arguments, backend)
    # The first query stands at key 20
    empty, full = slice(0, 20), slice(20, None)
    assert not result.output[:, :, empty].any()
    assert not result.entropy[:, :, empty].any()
    assert not result.coverage[:, :, empty].any()
    assert (result.iterations[:, :, empty] == 1).all()
    assert result.output[:, :, full].abs().amax(-1).min() > 0
    inputs = arguments["value"], arguments["query"]
    grads = torch.autograd.grad((result.output[:, :, empty] * 1e3).sum(), inputs, retain_graph=True)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    grads = torch.autograd.grad((result.output * 1e3).sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)


@both_backends
@pytest.mark.parametrize("feedback", ["normalized", "additive"])
def test_zero_vectors_have_finite_gradients(backend: str, feedback: str) -> None:
    """The embedding of padding is often zero, and then so are its query, key and value."""
    arguments = to(replace(LARGE, options=(("feedback", feedback),)).arguments(), torch.float32)
    for name, part in (("query", slice(0, 5)), ("key", slice(20, 45)), ("value", slice(20, 45))):
        arguments[name][:, :, part] = 0
    for name, grad in gradients(arguments, backend).items():
        assert grad.isfinite().all(), name
    # Nor when no loss reads them
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    for grad in torch.autograd.grad(solve(arguments, backend).output[:, :, 30:].sum(), leaves):
        assert grad.isfinite().all()


@both_backends
@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_out_of_reach_do_nothing(backend: str, is_causal: bool) -> None:
    options = (("is_causal", is_causal), ("max_iterations", 4))
    case = Case(seed=6, length=24, num_keys=24, max_span=6, ramp=3, options=options)
    arguments = case.arguments()
    # Half of the queries have a span whose edge ends before max_span does
    arguments["span"][..., ::2] = 1.5
    before, wanted = solve(arguments, backend), gradients(arguments, backend)["query"]
    position = torch.arange(24)
    for key in (0, 9, 23):
        changed = {**arguments, "key": arguments["key"].clone(), "value": arguments["value"].clone()}
        changed["key"][:, :, key] += 5
        changed["value"][:, :, key] -= 50
        distance = position - key
        beyond = (distance.abs() >= 6) | ((position % 2 == 0) & (distance.abs() >= 4.5))
        beyond |= (distance < 0) & is_causal
        after = solve(changed, backend)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[:, :, beyond], other[:, :, beyond])
        # And it does reach the others
        assert (after.output - before.output)[:, :, ~beyond].abs().amax((0, 1, 3)).min() > 0
        assert torch.equal(gradients(changed, backend)["query"][:, :, beyond], wanted[:, :, beyond])


@both_backends
@pytest.mark.parametrize("is_causal", [True, False])
def test_each_query_is_alone(backend: str, is_causal: bool) -> None:
    """A query's result, stopping included, is the same whatever else is computed beside it."""
    options = (("is_causal", is_causal), ("base_threshold", 0.05), ("max_iterations", 6))
    arguments = replace(LARGE, num_keys=70, options=options).arguments()
    together = solve(arguments, backend)
    assert together.iterations.unique().numel() > 2
    for row, t in ((0, 69), (1, 3), (1, 40)):
        part = slice(t, t + 1)
        one = {k: v[row : row + 1] if isinstance(v, Tensor) and v.shape[0] == 2 else v for k, v in arguments.items()}
        one |= {k: one[k][:, :, part] for k in ("query", "span", "temperature", "readout_weights")}
        alone = solve(one, backend, query_offset=t)
        expected = FocusOutput(*(x[row : row + 1, :, part] for x in together))
        assert_same(alone, expected)


@given(cases(longest=8, widest=5))
@examples(60)
def test_grouped_heads_are_repeated_heads(case: Case) -> None:
    arguments = replace(case, groups=2).arguments()
    grouped = solve(arguments, "blocked")
    assume_decided(arguments, grouped)
    repeated = {name: arguments[name].repeat_interleave(2, dim=1) for name in ("key", "value")}
    assert_same(solve(arguments, "blocked", **repeated), grouped)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "given"])
def test_never_queries_times_keys(is_causal: bool, mask: str) -> None:
    length = 1024
    case = Case(kv_heads=1, groups=1, length=length, num_keys=length, dim=4, value_dim=4, max_span=64, ramp=8)
    arguments = to(case.arguments(), torch.float32)
    arguments |= {k: v.requires_grad_() for k, v in arguments.items() if k in DIFFERENTIABLE}
    if mask == "given":
        arguments["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    seen = {}
    for backend in ("blocked", "reference"):
        with LargestTensor() as largest:
            solve(arguments, backend, is_causal=is_causal).output.sum().backward()
        seen[backend] = largest.elements
    assert seen["reference"] >= length * length
    # A block of queries against its band of keys is an eighth or less of this
    assert seen["blocked"] < length * 64


def saved_elements(arguments: dict[str, Any]) -> int:
    """How many numbers autograd keeps for the backward pass, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = solve(arguments, "blocked").output
    assert output.requires_grad
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in kept.values())


@pytest.mark.parametrize("readout", [False, True])
def test_memory_for_backward_does_not_grow_with_iterations(readout: bool) -> None:
    sizes = {}
    for iterations in (1, 8):
        options = (("max_iterations", iterations), ("base_threshold", 0.0))
        arguments = replace(LARGE, readout=readout, options=options).arguments()
        arguments |= {k: v.requires_grad_() for k, v in arguments.items() if k in DIFFERENTIABLE}
        # The weights of the iterations are an argument, and do grow
        given = arguments["readout_weights"].numel() if readout else 0
        sizes[iterations] = saved_elements(arguments) - given
    assert sizes[1] == sizes[8]
    # The arguments and little else
    assert sizes[8] < 1.2 * sum(arguments[name].numel() for name in DIFFERENTIABLE if name in arguments)


@both_backends
def test_statistics_have_no_gradient(backend: str) -> None:
    arguments = Case().arguments()
    arguments["query"].requires_grad_()
    result = solve(arguments, backend)
    assert result.output.requires_grad
    assert not any(x.requires_grad for x in result[1:])


@both_backends
def test_statistics_only_when_asked(backend: str) -> None:
    arguments = Case().arguments()
    result, full = solve(arguments, backend, need_statistics=False), solve(arguments, backend)
    assert result.entropy is None
    assert result.coverage is None
    assert torch.equal(result.output, full.output)
    assert torch.equal(result.iterations, full.iterations)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(4, 5, 3)),
        ("key", torch.zeros(1, 3, 5, 3)),
        ("key", torch.zeros(1, 2, 5, 4)),
        ("value", torch.zeros(1, 2, 6, 2)),
        ("span", torch.zeros(1, 2, 5)),
        ("readout_weights", torch.zeros(1, 4, 5, 2)),
        ("feedback_matrix", torch.zeros(4, 3, 2)),
        ("mix", torch.zeros(3)),
        ("gain", torch.zeros(4, 1)),
        ("attention_mask", torch.zeros(1, 1, 4, 5)),
        ("position_bias", torch.zeros(4, 5, 5)),
        ("feedback", "sum"),
        ("stop", "never"),
        ("max_span", 0),
        ("ramp", 0),
        ("max_iterations", 2.0),
        ("backend", "fast"),
    ],
)
def test_bad_arguments(name: str, value: Any) -> None:
    arguments = {**Case(readout=False).arguments(), "backend": "blocked", name: value}
    shown = tuple(value.shape) if isinstance(value, Tensor) else value
    with pytest.raises(FocusConfigError) as error:
        focus_attention(**arguments)
    assert f"`{name}` got {shown!r}" in str(error.value)
    assert "accepted" in str(error.value)


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


def test_blocked_refuses_a_second_derivative() -> None:
    query = torch.randn(1, 1, 6, 4, requires_grad=True)
    output = focus_attention(query, query, query, torch.full((1, 1, 6), 3.0), max_span=4, ramp=2, backend="blocked")
    with pytest.raises(FocusError, match="second derivative"):
        torch.autograd.grad(output.output.sum(), query, create_graph=True)
