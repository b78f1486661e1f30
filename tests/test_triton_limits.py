"""The fused backend's memory, what it refuses, and its configurations, compiled for a GPU."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case
from bare import Bare
from torch import Tensor
from triton_cases import (
    BASE,
    DEVICE,
    make,
    nothing_is_zero_by_luck,  # noqa: F401 - a fixture of every test
    on_device,
    solve,
    with_options,
)

from hf_focus import triton_backend
from hf_focus.errors import FocusConfigError, FocusError
from hf_focus.triton_backend import refusal
from hf_focus.triton_configs import (
    BACKWARD,
    BACKWARD_FLOAT32,
    FORWARD,
    FORWARD_FLOAT32,
    Config,
    Sizes,
    backward_config,
    forward_configs,
)


def test_scratch_does_not_grow_with_the_sequence() -> None:
    sizes = {}
    # A GPU has two programs for each of its multiprocessors
    for length in (2_000, 6_000) if DEVICE == "cpu" else (20_000, 60_000):
        p = make(replace(BASE, length=length, num_keys=length))
        wanted = {"query", "key"}
        iterations = torch.ones(p.query.shape[:3], dtype=torch.int64, device=DEVICE)
        arguments, programs = triton_backend.backward_arguments(p, iterations, p.query, wanted, Config(16, 32, 4, 1))
        assert arguments["d_value"] is None
        sizes[length] = arguments["scratch"].numel(), arguments["operands"].numel(), programs
    first, second = sizes.values()
    assert first == second


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
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    dtype = changes.get("dtype", torch.float32)
    case = replace(BASE, **{name: value for name, value in changes.items() if name != "dtype"})
    with pytest.raises(FocusConfigError) as error:
        solve(on_device(case.arguments(), dtype), "triton")
    assert all(word in str(error.value) for word in ("`backend`", "triton", *words))


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
    """All head sizes have one on an A100 and newer, for gradients too, and the spans decide nothing."""
    for shared_memory in (227 * 1024, 163 * 1024):
        for dtype, heads in ((torch.bfloat16, (32, 64, 96, 128, 256)), (torch.float32, (32, 64, 96, 128))):
            for dim in heads:
                case = Case(groups=1, length=2, num_keys=3000, dim=dim, value_dim=dim, max_span=64, kv_heads=1)
                sizes = Sizes.of(make(case, dtype))
                assert sizes == Sizes.of(make(replace(case, max_span=2048), dtype))
                forward = forward_configs(sizes, shared_memory)
                assert forward
                assert all(config.forward_bytes(sizes) <= shared_memory for config in forward)
                assert backward_config(sizes, shared_memory).backward_bytes(sizes) <= shared_memory


def test_products_of_several_groups_of_warps() -> None:
    """64 rows and more are multiplied asynchronously: queries, in gradients keys, and for F's own the features."""
    forward = [config for configs in FORWARD.values() for config in configs]
    backward = [config for configs in BACKWARD.values() for config in configs]
    for config in (*forward, *FORWARD_FLOAT32, *backward, *BACKWARD_FLOAT32):
        assert max(config.block_q, config.block_k) < 64 or config.warps == 4
    assert all(config.block_q < 64 for config in (*FORWARD_FLOAT32, *BACKWARD_FLOAT32))
    narrow = [config for widest in (64, 128) for config in BACKWARD[widest][:1]]
    assert all(config.warps == 4 for config in (*narrow, *BACKWARD_FLOAT32))


def test_smaller_chips() -> None:
    """99 KiB are enough for heads of 128, not for those of 256; float32 masks take room."""
    small = 99 * 1024
    for itemsize in (2, 4):
        assert forward_configs(Sizes(128, 128, itemsize), small)
        assert backward_config(Sizes(128, 128, itemsize), small)
    assert not forward_configs(Sizes(256, 256, 2), small)
    assert Sizes.of(make(replace(BASE, mask="additive", bias=True))).mask_bytes == 8
    assert Sizes.of(make(replace(BASE, mask="additive", bias=True), torch.bfloat16)).mask_bytes == 0
    plain, masked = (forward_configs(Sizes(128, 128, 2, size), small) for size in (0, 8))
    assert masked[0].block_q < plain[0].block_q


@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_compile_for_a_gpu(dim: int, tmp_path: Path, bare: Bare) -> None:
    """Without the GPU; K and V are read ahead, so are float32 masks and biases, and it fits as was reckoned."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton cannot compile for NVIDIA GPUs")
    done = bare.run("import triton_compile; triton_compile.main()", str(dim), "64", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Each once in the loop, and before it for every stage but the last
    assert found["forward"]["read_ahead"] == 2 * found["forward"]["stages"]
    assert found["forward, masked"]["read_ahead"] == 4 * found["forward, masked"]["stages"]
    assert len(found) == 6
    for name, kernel in found.items():
        assert kernel["shared"] <= kernel["reckoned"], name
