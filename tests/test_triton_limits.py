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
from hf_focus.triton_configs import FORWARD, Chip, Config, Sizes, backward_config, forward_configs


def test_scratch_does_not_grow_with_the_sequence() -> None:
    sizes = {}
    # A GPU has two programs for each of its multiprocessors
    for length in (2_000, 6_000) if DEVICE == "cpu" else (20_000, 60_000):
        p = make(replace(BASE, length=length, num_keys=length))
        wanted = {"query", "key"}
        iterations = torch.ones(p.query.shape[:3], dtype=torch.int64, device=DEVICE)
        arguments, programs = triton_backend.backward_arguments(p, iterations, p.query, wanted, Config(16, 32, 4))
        assert arguments["d_value"] is None
        sizes[length] = arguments["scratch"].numel(), programs
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
        ({"max_span": 4000, "num_keys": 9000}, ["`max_span` got 4000", "about 2,500"]),
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
    """Spans up to 1,024 have one, whatever the head size; 16-bit types keep on chip what fits."""
    on_chip = {(span, dim) for span in (1, 64, 256) for dim in (32, 64, 96, 128)} | {(512, 32), (512, 64)}
    hopper, older = Chip(227 * 1024, True), Chip(163 * 1024, False)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (32, 64, 96, 128, 256) if dtype == torch.bfloat16 else (32, 64, 96, 128):
            for span in (1, 64, 256, 512, 1024):
                shape = {"length": 2, "num_keys": 3000, "dim": dim, "value_dim": dim, "max_span": span, "kv_heads": 1}
                sizes = Sizes.of(make(Case(groups=1, **shape), dtype))
                best = forward_configs(sizes, hopper)[0]
                assert best.resident == (dtype == torch.bfloat16 and (span, dim) in on_chip)
                assert best.tiles(sizes) * best.block_k >= best.block_q + span - 1
                assert backward_config(sizes, hopper).block_q >= 16
                assert not any(config.resident for config in forward_configs(sizes, older))
    assert all(config.block_q >= 16 and config.block_k >= 16 for config in FORWARD)


def test_kernels_compile_for_a_gpu(tmp_path: Path, bare: Bare) -> None:
    """Without the GPU; and K and V are read before the iterations, not in them."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton cannot compile for NVIDIA GPUs")
    done = bare.run("import triton_compile; triton_compile.main()", "64", "64", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Two tiles of each, and the query; in the loop only F, in two halves, and cosines and sines
    assert found["tiles"] == 2
    assert found["loads_before_loop"] == 2 * 2 + 1
    assert found["loads_in_loop"] == 4
    assert max(found[name] for name in found if "shared" in name) <= 227 * 1024
