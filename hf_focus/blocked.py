"""Focus attention in cells, each some queries against their own band of keys: O(T·max_span), never T × T.

Backward solves cell by cell again, so that training keeps O(T) memory whatever the number of iterations is.
"""

from typing import Any

import torch
from torch import Tensor

from .cell_backward import differentiate_cell
from .cell_forward import CellTensors, Trace, solve_cell
from .cells import Workspace, cells, changed
from .errors import FocusError
from .problem import FocusOutput, FocusProblem

CONTIGUOUS = torch.contiguous_format


def solve(problem: FocusProblem, size: int | None = None) -> FocusOutput:
    """All cells of a problem, forward; nothing is recorded for autograd."""
    query, shared = problem.query, Workspace(problem)
    shape = query.shape[:3]
    output = query.new_empty(*shape, problem.value.shape[-1])
    iterations = torch.empty(shape, dtype=torch.long, device=query.device)
    statistics = [query.new_empty(shape, dtype=problem.compute_dtype) for _ in range(2 * problem.need_statistics)]
    for cell in cells(problem, size):
        solved = solve_cell(CellTensors(cell.cut(problem), shared))
        cell.of("query", output).copy_(solved.output)
        cell.of("query", iterations).copy_(solved.iterations)
        for whole, part in zip(statistics, solved[1:3], strict=False):
            cell.of("query", whole).copy_(part)
    entropy, coverage = statistics or (None, None)
    return FocusOutput(output, entropy, coverage, iterations)


def differentiate(
    problem: FocusProblem, grad: Tensor, wanted: list[str], size: int | None = None
) -> dict[str, Tensor]:
    """Gradients of the tensors `wanted`, by name, in their dtypes, given that of the output."""
    dtype, shared = problem.compute_dtype, Workspace(problem)
    problem = changed(problem, need_statistics=False)
    # Many cells add into one key: sums are kept at full precision
    sums = {name: torch.zeros_like(getattr(problem, name), dtype=dtype, memory_format=CONTIGUOUS) for name in wanted}
    for cell in cells(problem, size):
        tensors, trace = CellTensors(cell.cut(problem), shared), Trace()
        solve_cell(tensors, trace)
        parts = {name: cell.of(name, total) for name, total in sums.items()}
        differentiate_cell(tensors, trace, cell.of("query", grad).to(dtype), parts)
    return {name: total.to(getattr(problem, name).dtype) for name, total in sums.items()}


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: FocusProblem, size: int | None, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        problem = changed(problem, **dict(zip(FocusProblem.TENSORS, tensors, strict=True)))
        ctx.save_for_backward(*tensors, problem.attention_mask)
        # The context must not hold the tensors a second time, out of autograd's sight
        ctx.settings = changed(problem, **dict.fromkeys((*FocusProblem.TENSORS, "attention_mask")))
        ctx.size = size
        solved = solve(problem, size)
        ctx.mark_non_differentiable(*(x for x in solved[1:] if x is not None))
        return tuple(solved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FocusError("The blocked backend has no second derivative (create_graph=True); 'reference' has.")
        *tensors, mask = ctx.saved_tensors
        names = FocusProblem.TENSORS
        problem = changed(ctx.settings, **dict(zip(names, tensors, strict=True)), attention_mask=mask)
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True) if needed]
        grads = differentiate(problem, grad, wanted, ctx.size)
        return (None, None, *(grads.get(name) for name in names))


def focus_blocked(problem: FocusProblem, size: int | None = None) -> FocusOutput:
    """Solve `problem` in cells of `size` queries; None: what was measured to be fast on the device.

    Time O(T·(max_span + size)·iterations), memory O(T).
    """
    return FocusOutput(*_Blocked.apply(problem, size, *(getattr(problem, name) for name in FocusProblem.TENSORS)))
