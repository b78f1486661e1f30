"""Autograd around backends that bring their own backward, in eager mode and, as one operator, in compiled graphs."""

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend, check_name, choose, is_training
from .band_mask import BandMask
from .errors import FocusError
from .problem import FocusOutput, FocusProblem, changed, without_autocast

_REQUIRED = ("query", "key", "value", "span", "sharpness")
# Fields of `FocusProblem` beside its tensors, with the types that operators know
_SETTINGS = {
    "is_causal": "bool",
    "scaling": "float",
    "softcap": "float?",
    "query_offset": "SymInt",
    "max_span": "int",
    "ramp": "int",
    "max_iterations": "int",
    "feedback": "str",
    "anchored": "bool",
    "rotary_pairs": "str",
    "stop": "str",
    "base_threshold": "float",
    "threshold_scale": "float",
    "coverage_threshold": "float",
    "need_statistics": "bool",
}
_TENSORS = FocusProblem.ALL_TENSORS
_ARGUMENTS = ", ".join(
    [f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in _TENSORS]
    + [f"{kind} {name}" for name, kind in _SETTINGS.items()]
)


class _Focus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: FocusProblem, backend: Backend, *tensors: Tensor | None) -> tuple[Any, ...]:
        problem = changed(problem, **dict(zip(FocusProblem.TENSORS, tensors, strict=True)))
        mask = problem.attention_mask
        ctx.lazy_mask, mask = (None, mask) if isinstance(mask, Tensor) else (mask, None)
        solved = backend.solve(problem)
        ctx.save_for_backward(*tensors, problem.rotation, mask, solved.iterations)
        # The context must not hold the tensors a second time, out of autograd's sight
        ctx.settings = changed(problem, **dict.fromkeys(_TENSORS))
        ctx.backend = backend
        ctx.mark_non_differentiable(*(x for x in solved[1:] if x is not None))
        return tuple(solved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FocusError(
                f"backend {ctx.backend.name!r} has no second derivative (create_graph=True); use 'reference'."
            )
        *tensors, mask, iterations = ctx.saved_tensors
        mask = ctx.lazy_mask if mask is None else mask
        problem = changed(ctx.settings, **dict(zip(_TENSORS, (*tensors, mask), strict=True)))
        names = FocusProblem.TENSORS
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True) if needed]
        with without_autocast(grad):
            grads = ctx.backend.differentiate(problem, iterations, grad, wanted)
        return (None, None, *(grads.get(name) for name in names))


def _problem(arguments: tuple[Any, ...]) -> FocusProblem:
    return changed(None, **dict(zip((*_TENSORS, *_SETTINGS), arguments, strict=True)))


def _empty(like: Tensor) -> Tensor:
    # An operator's outputs are tensors, never None, and no two may share memory
    return like.new_empty(0)


def _forward(backend: str, training: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(arguments)
    output, entropy, coverage, iterations = choose(backend, problem, training).solve(problem)
    if entropy is None:
        entropy, coverage = _empty(output), _empty(output)
    return output, entropy, coverage, iterations


def _backward(grad: Tensor, iterations: Tensor, wanted: list[bool], backend: str, *arguments: Any) -> list[Tensor]:
    problem = _problem(arguments)
    names = [name for name, needed in zip(FocusProblem.TENSORS, wanted, strict=True) if needed]
    with without_autocast(grad):
        grads = choose(backend, problem, training=True).differentiate(problem, iterations, grad, names)
    return [grads[name] for name in names]


# Loaded as remote code, this module exists several times in one process, and an operator's name is for one
_NAME = "hf_focus::attention" + ("" if __package__ == "hf_focus" else f"_{zlib.crc32(__package__.encode()):08x}")
_forward_op = torch.library.custom_op(
    _NAME,
    _forward,
    mutates_args=(),
    schema=f"(str backend, bool training, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor iterations, bool[] wanted, str backend, {_ARGUMENTS}) -> Tensor[]",
)


@_forward_op.register_fake
def _(backend: str, training: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(arguments)
    shape, query = problem.query.shape[:3], problem.query
    output = query.new_empty(*shape, problem.value.shape[-1])
    shape = shape if problem.need_statistics else (0,)
    entropy, coverage = (query.new_empty(shape, dtype=problem.compute_dtype) for _ in range(2))
    return output, entropy, coverage, query.new_empty(problem.query.shape[:3], dtype=torch.long)


@_backward_op.register_fake
def _(grad: Tensor, iterations: Tensor, wanted: list[bool], backend: str, *arguments: Any) -> list[Tensor]:
    tensors = zip(arguments, wanted, strict=False)
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor, needed in tensors if needed]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, arguments = inputs[0], inputs[2:]
    ctx.save_for_backward(*arguments[: len(_TENSORS)], output[3])
    ctx.settings = arguments[len(_TENSORS) :]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[2 : 2 + len(FocusProblem.TENSORS)])
    *tensors, iterations = ctx.saved_tensors
    grads = iter(_backward_op(grad, iterations, wanted, ctx.backend, *tensors, *ctx.settings))
    rest = len(_TENSORS) - len(FocusProblem.TENSORS) + len(ctx.settings)
    return (None, None, *(next(grads) if needed else None for needed in wanted), *(None for _ in range(rest)))


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def run(problem: FocusProblem, name: str) -> FocusOutput:
    """Solve `problem` with the backend `name`, or the best one for `"auto"`, differentiably.

    Under `torch.compile` this is a single node of the graph, `hf_focus::attention`, which runs as in eager mode and
    chooses then; the reference is traced.
    """
    training = is_training(problem)
    if torch.compiler.is_compiling() and name != "reference":
        check_name(name)
        if isinstance(problem.attention_mask, BandMask):
            problem = changed(problem, attention_mask=problem.attention_mask.dense())
        arguments = (getattr(problem, field) for field in (*_TENSORS, *_SETTINGS))
        output, entropy, coverage, iterations = _forward_op(name, training, *arguments)
        statistics = (entropy, coverage) if problem.need_statistics else (None, None)
        return FocusOutput(output, *statistics, iterations)
    backend = choose(name, problem, training)
    if backend.differentiate is None:
        return backend.solve(problem)
    # Forward-mode tangents are not seen in `requires_grad`; the function below refuses them
    if not training and getattr(forward_ad, "_current_level", -1) < 0:
        with torch.no_grad():
            return backend.solve(problem)
    return FocusOutput(*_Focus.apply(problem, backend, *(getattr(problem, name) for name in FocusProblem.TENSORS)))
