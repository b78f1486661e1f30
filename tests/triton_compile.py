"""Compiles the fused kernels for a GPU that need not be there. A program: TRITON_INTERPRET must not be set."""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_focus import triton_backend
from hf_focus.problem import FocusProblem
from hf_focus.triton_configs import Config, Sizes, backward_config, decode_config, forward_configs

# Bytes of shared memory
HOPPER = 227 * 1024
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}


def describe(x: Any, path: tuple[int, ...], aligned: dict, constants: dict) -> Any:
    """The type of one argument as triton's launcher would see it; constants and alignment are noted by path."""
    if isinstance(x, tuple):
        return tuple(describe(part, (*path, i), aligned, constants) for i, part in enumerate(x))
    if x is None or (isinstance(x, int) and x == 1):
        constants[path] = x
        return "constexpr"
    if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
        aligned[path] = [["tt.divisibility", 16]]
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return {int: "i32", float: "fp32"}[type(x)]


def compiled(kernel: Any, arguments: dict[str, Any], capability: int = 90) -> Any:
    """The kernel for these arguments, of which tensors give only their dtype."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    aligned, constants, signature = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        x = arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)] = x
            signature[parameter.name] = "constexpr"
        else:
            of_any_value = parameter.do_not_specialize
            signature[parameter.name] = "i32" if of_any_value else describe(x, (i,), aligned, constants)
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def problem(length: int, dim: int, span: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> FocusProblem:
    """A problem without memory: 8 heads, 2 of keys, 4 iterations, everything learned."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads, keys = 8, 2, max(length, 1024)
    arguments = {
        "query": tensor(2, heads, length, dim, dtype=dtype),
        "key": tensor(2, kv_heads, keys, dim, dtype=dtype),
        "value": tensor(2, kv_heads, keys, dim, dtype=dtype),
        "span": tensor(2, heads, length),
        "sharpness": tensor(2, heads, length),
        "readout_weights": tensor(2, heads, length, 4),
        "feedback_matrix": tensor(heads, dim, dim),
        "mix": tensor(heads),
        "gain": tensor(heads),
        "rotation": tensor(2, 1, length, dim, dtype=dtype),
        "attention_mask": None,
        "position_bias": None,
        "is_causal": True,
        "scaling": dim**-0.5,
        "softcap": None,
        "query_offset": keys - length,
        "max_span": span,
        "ramp": 32,
        "max_iterations": 4,
        "feedback": "normalized",
        "anchored": False,
        "rotary_pairs": "halves",
        "stop": "absolute",
        "base_threshold": 1e-4,
        "threshold_scale": 0.1,
        "coverage_threshold": 0.01,
        "need_statistics": True,
    }
    return FocusProblem(**(arguments | changes))


def forward(p: FocusProblem, config: Config) -> Any:
    return compiled(triton_backend.forward_kernel, {**triton_backend.forward_arguments(p), **config.options})


def decode(p: FocusProblem) -> Any:
    return compiled(triton_backend.decode_kernel, {**triton_backend.forward_arguments(p), **decode_config(p)})


def backward(p: FocusProblem, config: Config) -> Any:
    iterations = torch.empty(p.query.shape[:3], dtype=torch.int64, device="meta")
    wanted = set(p.TENSORS) - {"position_bias"}
    arguments, _ = triton_backend.backward_arguments(p, iterations, torch.empty_like(p.query), wanted, config)
    return compiled(triton_backend.backward_kernel, {**arguments, **config.options})


def facts(kernel: Any, config: Config | None, reckoned: int) -> dict[str, int]:
    return {
        "stages": config.stages if config else 1,
        "read_ahead": kernel.asm["ttgir"].count("ttg.async_copy_global_to_local"),
        "shared": kernel.metadata.shared,
        "reckoned": reckoned,
    }


def main() -> None:
    """Prints, as JSON, what a small case of each kernel compiled to."""
    dim, span = (int(x) for x in sys.argv[1:])
    p = problem(1024, dim, span, need_statistics=False)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = {"attention_mask": empty(2, 8, 1024, 1024), "position_bias": empty(1, 8, 1024, 1024)}
    values = {"value": empty(2, 2, 1024, 2 * dim, dtype=torch.bfloat16), "feedback_matrix": empty(8, 2 * dim, dim)}
    found = {}
    for name, q in {
        "forward": p,
        "forward, masked": replace(p, **wide),
        "forward, statistics": replace(p, need_statistics=True),
        "forward, values of another size": replace(p, **values),
    }.items():
        config = forward_configs(Sizes.of(q), HOPPER)[0]
        found[name] = facts(forward(q, config), config, config.forward_bytes(Sizes.of(q)))
    config = backward_config(Sizes.of(p), HOPPER)
    found["backward"] = facts(backward(p, config), config, config.backward_bytes(Sizes.of(p)))
    found["decode"] = facts(decode(problem(1, dim, span)), None, HOPPER)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
