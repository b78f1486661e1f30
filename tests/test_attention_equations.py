"""Focus attention: the reference against brute force, the blocked path against the reference."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKENDS,
    DIFFERENTIABLE,
    Case,
    assert_same,
    assume_decided,
    both_backends,
    cases,
    examples,
    gradients,
    solve,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hf_focus import FocusOutput


def rms(x: list[float]) -> float:
    return math.sqrt(sum(a * a for a in x) / len(x))


def brute_update(
    first: list[float], query: list[float], output: list[float], at: tuple[int, int, int], arguments: dict[str, Any]
) -> list[float]:
    """The next query, as the docstrings say it."""
    row, head, place = at
    if "feedback_matrix" in arguments:
        matrix = arguments["feedback_matrix"][head].tolist()
        fed = [sum(output[i] * matrix[i][j] for i in range(len(output))) for j in range(len(query))]
    else:
        fed = [output[j] if j < len(output) else 0.0 for j in range(len(query))]
    if "rotation" in arguments:
        cos, sin = arguments["rotation"].expand(-1, len(arguments["query"]), -1, -1)[:, row, place].tolist()
        size, halves = len(cos), arguments["rotary_pairs"] == "halves"
        pairs = [(i, i + size // 2) if halves else (2 * i, 2 * i + 1) for i in range(size // 2)]
        straight = list(fed)
        for one, other in pairs:
            fed[one] = straight[one] * cos[one] - straight[other] * sin[one]
            fed[other] = straight[other] * cos[other] + straight[one] * sin[other]
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
            query = brute_update(first, query, output, (b, h, t), arguments)
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


@given(cases(longest=8, widest=5))
@examples(60)
def test_grouped_heads_are_repeated_heads(case: Case) -> None:
    arguments = replace(case, groups=2).arguments()
    grouped = solve(arguments, "blocked")
    assume_decided(arguments, grouped)
    repeated = {name: arguments[name].repeat_interleave(2, dim=1) for name in ("key", "value")}
    assert_same(solve(arguments, "blocked", **repeated), grouped)
