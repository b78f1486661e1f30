"""Focus attention in cells, each some queries against their own band of keys: O(T·max_span), never T × T.

Backward solves cell by cell again, so that training keeps O(T) memory whatever the number of iterations is.
"""

import torch
from torch import Tensor

from .cell_backward import differentiate_cell
from .cell_forward import CellTensors, Trace, solve_cell
from .cells import Workspace, cells
from .one_query import is_one_query, solve_one_query
from .problem import FocusOutput, FocusProblem, changed


def solve(problem: FocusProblem, size: int | None = None) -> FocusOutput:
    """Solve `problem`; nothing is recorded for autograd. Time O(T·(max_span + size)·iterations), memory O(T).

    Args:
        size: queries of a cell; None: what was measured to be fast on the device.
    """
    if is_one_query(problem):
        return solve_one_query(problem)
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
    problem: FocusProblem, iterations: Tensor, grad: Tensor, wanted: list[str], size: int | None = None
) -> dict[str, Tensor]:
    """Gradients of the tensors `wanted`, by name, in their dtypes, given that of the output.

    `iterations`, which `solve` found, are found again.
    """
    dtype, shared = problem.compute_dtype, Workspace(problem)
    problem = changed(problem, need_statistics=False)
    # Many cells add into one key: sums are kept at full precision. Each query is of one cell, which fills its place
    sums = {
        name: (torch.empty_like if name == "query" else torch.zeros_like)(
            getattr(problem, name), dtype=dtype, memory_format=torch.contiguous_format
        )
        for name in wanted
    }
    for cell in cells(problem, size, kept=problem.max_iterations):
        tensors, trace = CellTensors(cell.cut(problem), shared), Trace()
        solve_cell(tensors, trace)
        parts = {name: cell.of(name, total) for name, total in sums.items()}
        differentiate_cell(tensors, trace, cell.of("query", grad).to(dtype), parts)
    return {name: total.to(getattr(problem, name).dtype) for name, total in sums.items()}
