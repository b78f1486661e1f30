"""Memory of focus attention: how much it takes and keeps, and any layout of its inputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DIFFERENTIABLE, LARGE, TIGHT, Case, assert_same, both_backends, gradients, solve, to
from helpers import LargestTensor
from torch import Tensor


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
