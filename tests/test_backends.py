"""Which backend a call gets, and what it is told where that cannot be."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_focus import FocusConfig, backends, focus_attention
from hf_focus.attention import keep_problems
from hf_focus.differentiable import _SETTINGS, _TENSORS, _forward_op
from hf_focus.errors import FocusConfigError


def arguments(dim: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, dim, dtype=dtype) for _ in range(3))
    return {"query": query, "key": key, "value": value, "span": torch.full((1, 2, 5), 2.0), "max_span": 4, "ramp": 2}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> str:
    """A fast backend that can do little, tried first by "auto"."""
    limits = {"devices": ("cpu",), "dtypes": (torch.float32,), "max_head_dim": 8}
    refusal = lambda problem, training: "it has no gradient" if training else None  # noqa: E731
    fast = replace(backends.BACKENDS["blocked"], name="fast", refusal=refusal, **limits)
    monkeypatch.setitem(backends.BACKENDS, "fast", fast)
    monkeypatch.setattr(backends, "AUTO", ("fast", "blocked"))
    backends._tell.cache_clear()
    return "fast"


CANNOT = {
    "dtype": ({"dtype": torch.float64}, False, "torch.float32.*torch.float64"),
    "head size": ({"dim": 9}, False, "up to 8.*9"),
    "training": ({}, True, "no gradient"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_run_says_why(name: str, limited: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, training, message = CANNOT[name]
    given = arguments(**settings)
    given["query"].requires_grad_(training)
    with pytest.raises(FocusConfigError, match=f"`backend`.*fast.*{message}"):
        focus_attention(**given, backend=limited)
    with caplog.at_level(logging.DEBUG, "hf_focus.backends"):
        for _ in range(2):
            torch.testing.assert_close(
                focus_attention(**given).output, focus_attention(**given, backend="reference").output
            )
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["backend 'fast' not used"]


def test_auto_takes_the_first_that_can(limited: str) -> None:
    with keep_problems() as kept:
        focus_attention(**arguments())
    assert backends.choose("auto", kept[0], training=False).name == limited


def test_no_gradient_is_no_training(limited: str) -> None:
    given = arguments()
    given["query"].requires_grad_()
    with torch.no_grad():
        focus_attention(**given, backend=limited)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(FocusConfigError, match=r"`backend`.*'fastest'.*'auto', 'triton', 'blocked'"):
        focus_attention(**arguments(), backend="fastest")


def test_config_knows_every_backend() -> None:
    for name in ("auto", *backends.BACKENDS):
        assert FocusConfig(backend=name).backend == name


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_operator_keeps_torchs_rules(iterations: int) -> None:
    """Schema, fake tensors, autograd registration: what torch.compile and torch.export rely on."""
    given = arguments()
    given["readout_weights"] = torch.rand(1, 2, 5, iterations)
    for name in ("query", "value", "span"):
        given[name].requires_grad_()
    with keep_problems() as kept:
        focus_attention(**given, max_iterations=iterations, need_statistics=iterations > 1)
    inputs = [getattr(kept[0], name) for name in (*_TENSORS, *_SETTINGS)]
    torch.library.opcheck(_forward_op, ("blocked", True, *inputs))
