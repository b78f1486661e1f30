"""Arguments of focus attention: what is refused, and what is returned only when asked for."""

from typing import Any

import pytest
import torch
from attention_cases import Case, both_backends, solve
from torch import Tensor

from hf_focus import focus_attention
from hf_focus.errors import FocusConfigError, FocusError


def test_integers_are_no_mask() -> None:
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(FocusConfigError, match=r"`attention_mask` got torch.int64; accepted: torch.bool"):
        focus_attention(query, query, query, torch.zeros(1, 2, 5), attention_mask=torch.zeros(1, 1, 5, 5).long())


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
        ("rotation", torch.zeros(2, 1, 5, 4)),
        ("rotation", torch.zeros(1, 1, 5, 2)),
        ("rotary_pairs", "thirds"),
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


def test_blocked_refuses_a_second_derivative() -> None:
    query = torch.randn(1, 1, 6, 4, requires_grad=True)
    output = focus_attention(query, query, query, torch.full((1, 1, 6), 3.0), max_span=4, ramp=2, backend="blocked")
    with pytest.raises(FocusError, match="second derivative"):
        torch.autograd.grad(output.output.sum(), query, create_graph=True)
