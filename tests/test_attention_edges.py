"""Queries that see nothing, keys out of reach, NaN and zeros: what each query may depend on."""

from dataclasses import replace

import pytest
import torch
from attention_cases import LARGE, TIGHT, Case, assert_same, both_backends, gradients, solve, to
from torch import Tensor

from hf_focus import FocusOutput, focus_attention


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


@both_backends
@pytest.mark.parametrize("name", ["attention_mask", "rotation"])
def test_no_gradient_where_none_is_given(backend: str, name: str) -> None:
    """A mask or rotation that requires one changes nothing."""
    arguments = replace(LARGE, mask="additive", rotated=True).arguments()
    expected = solve(arguments, backend)
    arguments[name].requires_grad_()
    with torch.no_grad():
        assert_same(solve(arguments, backend), expected)
    assert_same(solve(arguments, backend), expected)


def test_forward_mode_is_refused() -> None:
    """And not silently left out."""
    arguments = LARGE.arguments()
    with torch.autograd.forward_ad.dual_level():
        query = torch.autograd.forward_ad.make_dual(arguments["query"], torch.ones_like(arguments["query"]))
        with pytest.raises(RuntimeError, match="jvp"):
            solve(arguments, "blocked", query=query)
