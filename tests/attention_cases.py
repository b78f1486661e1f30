"""Random problems of focus attention, their solutions and gradients, and how tests compare those."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_focus import FocusOutput, blocked, focus_attention
from hf_focus.backends import BACKENDS as ALL_BACKENDS

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
    rotated: bool = False
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
        spans = {
            "random": share * self.max_span,
            "wide": (1 + share) / 2 * self.max_span,
            "zero": share * 0,
            "one": share * 0 + 1,
        }
        full = (self.batch, heads, self.length, self.num_keys)
        arguments = {
            "query": normal(self.batch, heads, self.length, self.dim),
            "key": normal(self.batch, self.kv_heads, self.num_keys, self.dim),
            "value": normal(self.batch, self.kv_heads, self.num_keys, self.value_dim),
            "span": spans[self.span],
            "temperature": (normal(self.batch, heads, self.length) / 4).exp(),
            **options,
        }
        if self.readout:
            arguments["readout_weights"] = normal(*full[:3], options["max_iterations"]).softmax(-1)
        if self.learned:
            arguments["feedback_matrix"] = normal(heads, self.value_dim, self.dim)
            arguments["mix"] = normal(heads).sigmoid()
            arguments["gain"] = (normal(heads) / 4).exp()
        if self.rotated:
            rows = 1 if self.seed % 2 else self.batch
            # No circle is needed: any numbers scale and exchange pairs of features; the last ones may stay
            arguments["rotation"] = normal(
                2, rows, self.length, self.dim // (4 if self.seed % 3 == 0 and self.dim > 3 else 2) * 2
            )
            arguments["rotary_pairs"] = ("halves", "neighbours")[self.seed // 2 % 2]
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
        span=draw(st.sampled_from(["random", "wide", "zero", "one"])),
        shared_span=draw(st.booleans()),
        mask=draw(st.sampled_from(["none", "bool", "additive", "padding"])),
        bias=draw(st.booleans()),
        learned=draw(st.booleans()),
        rotated=draw(st.booleans()),
        readout=draw(st.booleans()),
        options=tuple(options.items()),
    )


LARGE = Case(seed=4, batch=2, length=70, num_keys=90, dim=16, value_dim=12, max_span=20, ramp=6, mask="padding")


def to(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


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
