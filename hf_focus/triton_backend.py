"""The fused backend: what it can run, with which block sizes, and how its kernels are launched.

`refusal` says why a problem cannot run here; `solve` and `differentiate` are for one that can. Nothing waits for the
device.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import bad_value
from .iteration import turn
from .problem import FocusOutput, FocusProblem
from .triton_configs import (
    INTERPRETER,
    Config,
    Sizes,
    backward_config,
    decode_config,
    forward_configs,
    padded,
)

try:
    import triton
    from triton.runtime.jit import JITFunction

    from .triton_backward import backward_kernel
    from .triton_decode import decode_kernel
    from .triton_forward import forward_kernel

    INTERPRETED = not isinstance(forward_kernel, JITFunction)
except ImportError:
    triton = None
    INTERPRETED = False

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LARGEST_FLOAT32_HEAD = 128

# Configurations that are measured; the others are for what does not fit
CANDIDATES = 2
# The fastest configuration by shape, found on first use
_TUNED: dict[tuple[Any, ...], Config] = {}


def refusal(problem: FocusProblem, training: bool) -> str | None:
    """Why the fused backend cannot solve `problem`, with gradients if `training`; None if it can."""
    q, k, v = problem.query, problem.key, problem.value
    if triton is None:
        return "it needs triton, which is not installed (`pip install triton`)"
    if q.device.type != "cuda" and not INTERPRETED:
        return bad_value("query.device", str(q.device), "a cuda device, or any with TRITON_INTERPRET=1 set on import")
    if q.is_cuda and torch.version.hip is not None:
        return bad_value("query.device", "an AMD GPU", "NVIDIA's")
    if q.is_cuda and (found := _capability(q.device))[0] < 8:
        return bad_value("query.device", f"compute capability {found[0]}.{found[1]}", "8.0 and newer")
    for name, tensor in (("key", k), ("value", v)):
        if tensor.dtype != q.dtype:
            return bad_value(f"{name}.dtype", tensor.dtype, f"the query's, {q.dtype}")
    name, widest = max((("query", q.shape[-1]), ("value", v.shape[-1])), key=lambda named: named[1])
    if q.dtype == torch.float32 and widest > LARGEST_FLOAT32_HEAD:
        accepted = (
            f"up to {LARGEST_FLOAT32_HEAD} in float32, where F does not fit on chip, up to {LARGEST_HEAD} in 16 bits"
        )
        return bad_value(f"{name}.shape[-1]", widest, accepted)
    shared_memory, sizes = _shared_memory(q.device), Sizes.of(problem)
    fits = q.shape[2] == 1 or forward_configs(sizes, shared_memory)
    if not fits or (training and backward_config(sizes, shared_memory) is None):
        why = "" if not fits else ", for gradients"
        accepted = f"less, on a GPU with {shared_memory} bytes of shared memory{why}"
        return bad_value(f"{name}.shape[-1]", widest, accepted)
    if training and torch.are_deterministic_algorithms_enabled():
        return "it adds gradients in no fixed order, which torch.use_deterministic_algorithms forbids"
    return None


# Asking the driver takes longer than all else that is asked here
@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have."""
    if device.type != "cuda":
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


def _on_device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides by which `x` is read where it is broadcast: 0 along axes of size 1. A problem has all axes."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _mask(p: FocusProblem) -> tuple[Tensor | None, tuple[int, ...]]:
    """The attention mask, its strides over (B, H, T, S) and an offset in elements."""
    mask = p.attention_mask
    if mask is None:
        return None, (0,) * 5
    if isinstance(mask, Tensor):
        return mask, (*_broadcast_strides(mask), 0)
    # Of a lazy mask the band alone: one key on in a row is one column on, one query on is one column back
    band = mask.read_band(p.max_span, 0 if p.is_causal else p.max_span - 1).contiguous()
    of_batch, of_head, of_query, of_key = _broadcast_strides(band)
    return band, (of_batch, of_head, of_query - of_key, of_key, (p.max_span - 1 - p.query_offset) * of_key)


def shared_arguments(p: FocusProblem) -> dict[str, Any]:
    """The arguments that all kernels have in common: inputs, their strides, sizes, settings."""
    _, heads, length, dim = p.query.shape
    kv_heads, num_keys, value_dim = *p.key.shape[1:3], p.value.shape[-1]
    block_d, block_dv = padded(dim), padded(value_dim)
    matrix = p.feedback_matrix
    if matrix is not None:
        matrix = matrix.to(p.query.dtype)
    elif block_d != block_dv or p.rotation is not None:
        matrix = torch.eye(value_dim, dim, dtype=p.query.dtype, device=p.query.device).expand(heads, -1, -1)
    rotation, rotation_strides = p.rotation, (0,) * 4
    if rotation is not None:
        # F, and F turned: what the sines are for. Features that are not rotated have the cosine 1 and the sine 0
        size = rotation.shape[-1]
        turned = turn(matrix[..., :size], p.rotary_pairs)
        if size < dim:
            cos, sin = pad(rotation[0], (0, dim - size), value=1.0), pad(rotation[1], (0, dim - size))
            rotation, turned = torch.stack([cos, sin]), pad(turned, (0, dim - size))
        matrix, rotation_strides = torch.cat([matrix, turned], dim=-1), _broadcast_strides(rotation)
    bias = p.position_bias
    mask, mask_strides = _mask(p)
    additive = mask is not None and mask.dtype != torch.bool
    return {
        "query": p.query,
        "key": p.key,
        "value": p.value,
        "span": p.span,
        "sharpness": p.sharpness,
        "readout": p.readout_weights,
        "matrix": matrix,
        "mix": p.mix if p.feedback == "normalized" else None,
        "gain": p.gain if p.feedback == "normalized" else None,
        "rotation": rotation,
        # Triton has no pointers to single bits
        "mask": mask if additive or mask is None else mask.view(torch.uint8),
        "bias": bias,
        "query_strides": p.query.stride(),
        "key_strides": p.key.stride(),
        "value_strides": p.value.stride(),
        "span_strides": _broadcast_strides(p.span),
        "sharpness_strides": _broadcast_strides(p.sharpness),
        "readout_strides": (0,) * 4 if p.readout_weights is None else p.readout_weights.stride(),
        "matrix_strides": (0,) * 3 if matrix is None else matrix.stride(),
        "rotation_strides": rotation_strides,
        "mask_strides": mask_strides,
        "bias_strides": (*((0,) * 4 if bias is None else _broadcast_strides(bias)), 0),
        "heads": heads,
        "groups": heads // kv_heads,
        "length": length,
        "num_keys": num_keys,
        "offset": p.query_offset,
        "max_iterations": p.max_iterations,
        "scale": float(p.scaling),
        "softcap": None if p.softcap is None else float(p.softcap),
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "MAX_SPAN": p.max_span,
        "RAMP": p.ramp,
        "CAUSAL": p.is_causal,
        "NORMALIZED": p.feedback == "normalized",
        "ANCHORED": p.anchored,
        "ADDITIVE_MASK": additive,
        # One TF32 product has 10 bits; three make up for nearly all of float32's 23
        "PRECISION": "widened" if INTERPRETED else "tf32x3",
    }


def forward_arguments(p: FocusProblem) -> dict[str, Any]:
    """Arguments of `forward_kernel` but for its configuration; the outputs are made here."""
    batch, heads, length, _ = p.query.shape
    output = p.query.new_empty(batch, heads, length, p.value.shape[-1])
    entropy, coverage = (
        torch.empty(batch, heads, length, dtype=torch.float32, device=p.query.device) if p.need_statistics else None
        for _ in range(2)
    )
    return {
        **shared_arguments(p),
        "output": output,
        "entropy": entropy,
        "coverage": coverage,
        "iterations": torch.empty(batch, heads, length, dtype=torch.int64, device=p.query.device),
        "output_strides": output.stride(),
        "base_threshold": float(p.base_threshold),
        "threshold_scale": float(p.threshold_scale),
        "coverage_threshold": float(p.coverage_threshold),
        "RELATIVE": p.stop == "relative",
    }


def solve(problem: FocusProblem) -> FocusOutput:
    """Solve `problem` in fused kernels. Time O(T·max_span·iterations); memory O(T), whatever the iterations.

    Half-precision inputs: matrix products, F included, take rounded inputs and add up in float32; all else is float32.
    Float32 inputs: products in three TF32 parts, about as exact as float32.
    """
    p = problem
    arguments = forward_arguments(p)
    batch, heads, length, _ = p.query.shape
    if batch * heads * length:
        with _on_device(p.query):
            if length == 1:
                del arguments["length"]
                decode_kernel[(batch * heads,)](**arguments, **decode_config(p))
            else:

                def launch(config: Config) -> None:
                    blocks = triton.cdiv(length, config.block_q)
                    forward_kernel[(batch * heads * blocks,)](**arguments, **config.options)

                launch(_tuned(p, launch))
    return FocusOutput(*(arguments[name] for name in ("output", "entropy", "coverage", "iterations")))


def _tuned(p: FocusProblem, launch: Any) -> Config:
    """The fastest forward configuration for this kind of problem, measured once. Forward may run any number of times;
    backward, which adds into memory, may not, and is not measured."""
    if INTERPRETED:
        return INTERPRETER
    sizes = Sizes.of(p)
    configs = forward_configs(sizes, _shared_memory(p.query.device))
    if len(configs) == 1:
        return configs[0]
    queries = p.query.shape[0] * p.query.shape[1] * p.query.shape[2]
    masks = tuple(None if x is None else x.dtype for x in (p.attention_mask, p.position_bias))
    settings = (p.max_span, p.is_causal, p.feedback, p.max_iterations, p.need_statistics)
    kind = (p.query.device, p.query.dtype, sizes, queries.bit_length(), *masks, *settings)
    if kind not in _TUNED:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = {}
        for config in configs:
            if len(times) == CANDIDATES:
                break
            try:
                times[config] = triton.testing.do_bench(lambda config=config: launch(config), warmup=5, rep=20)
            except (triton.runtime.OutOfResources, triton.runtime.errors.PTXASError):
                # The estimate of what fits was too kind
                continue
        _TUNED[kind] = min(times, key=times.get) if times else configs[-1]
    return _TUNED[kind]


def backward_arguments(
    p: FocusProblem, iterations: Tensor, grad: Tensor, wanted: set[str], config: Config
) -> tuple[dict[str, Any], int]:
    """Arguments of `backward_kernel`, and how many programs share the work. Gradients of `wanted` are made here."""
    arguments = shared_arguments(p)
    batch, heads, length, dim = p.query.shape
    device, value_dim = p.query.device, p.value.shape[-1]

    def empty(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if name in wanted else None

    def zeros(name: str, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=torch.float32, device=device) if name in wanted else None

    bias = p.position_bias
    d_bias = None if bias is None else zeros("position_bias", *bias.shape)
    blocks = triton.cdiv(length, config.block_q)
    work = blocks * batch * heads
    resident = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    programs = min(work, resident)
    matrix_row = dim if p.rotation is None else 2 * dim
    wide, rows = arguments["BLOCK_D"] + arguments["BLOCK_DV"], p.max_iterations * config.block_q
    arguments |= {
        "iterations": iterations,
        "grad": grad,
        "grad_strides": grad.stride(),
        "d_query": empty("query", batch, heads, length, dim, dtype=p.query.dtype),
        "d_key": zeros("key", *p.key.shape),
        "d_value": zeros("value", *p.value.shape),
        "d_span": empty("span", batch, heads, length),
        "d_sharpness": empty("sharpness", batch, heads, length),
        "d_readout": empty("readout_weights", batch, heads, length, p.max_iterations),
        "d_matrix": zeros("feedback_matrix", heads, value_dim, matrix_row),
        "d_matrix_row": matrix_row,
        "d_mix": zeros("mix", heads),
        "d_gain": zeros("gain", heads),
        "d_bias": d_bias,
        "d_bias_strides": (0,) * 4 if d_bias is None else _broadcast_strides(d_bias),
        "scratch": torch.empty(programs * rows * (wide + 2), dtype=torch.float32, device=device),
        "operands": torch.empty(programs * rows * wide, dtype=p.query.dtype, device=device),
        "blocks": blocks,
        "work": work,
    }
    return arguments, programs


_GRADIENTS = {
    "query": "d_query",
    "key": "d_key",
    "value": "d_value",
    "span": "d_span",
    "sharpness": "d_sharpness",
    "readout_weights": "d_readout",
    "feedback_matrix": "d_matrix",
    "mix": "d_mix",
    "gain": "d_gain",
    "position_bias": "d_bias",
}


def differentiate(problem: FocusProblem, iterations: Tensor, grad: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """Gradients of the tensors `wanted`, by name, in their dtypes, given that of the output.

    Args:
        iterations: that `solve` found: the steps to go back.
    """
    config = INTERPRETER
    if not INTERPRETED:
        config = backward_config(Sizes.of(problem), _shared_memory(problem.query.device))
    arguments, programs = backward_arguments(problem, iterations, grad, set(wanted), config)
    if programs:
        with _on_device(problem.query):
            backward_kernel[(programs,)](**arguments, **config.options)
    if problem.rotation is not None and arguments["d_matrix"] is not None:
        dim, size = problem.query.shape[-1], problem.rotation.shape[-1]
        straight, turned = arguments["d_matrix"].split(dim, dim=-1)
        # Backwards, a turn is the opposite one
        straight[..., :size] -= turn(turned[..., :size], problem.rotary_pairs)
        # A compiler was told so
        arguments["d_matrix"] = straight.contiguous()
    given = {name: getattr(problem, name) for name in wanted}
    return {name: arguments[_GRADIENTS[name]].sum_to_size(t.shape).to(t.dtype) for name, t in given.items()}
