"""Focus attention in blocks of queries, each against its own band of keys: O(T·max_span), never T × T.

Backward recomputes block by block, so that training keeps O(T) memory whatever the number of iterations is.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import FocusError
from .iteration import feed_back, has_converged
from .masks import read_mask
from .problem import FocusOutput, FocusProblem

QUERY_BLOCK = 64


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) and the keys [first, last) that any of them can reach."""

    start: int
    stop: int
    first: int
    last: int

    def of(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """The part of a tensor of the problem that this block reads: a view, never a copy."""
        if tensor is None or name in ("feedback_matrix", "mix", "gain"):
            return tensor
        if name in ("key", "value"):
            return tensor[:, :, self.first : self.last]
        if name in ("attention_mask", "position_bias"):
            return read_mask(tensor, slice(self.start, self.stop), slice(self.first, self.last))
        return tensor[:, :, self.start : self.stop]


def _blocks(problem: FocusProblem, size: int) -> list[_Block]:
    length, num_keys = problem.query.shape[2], problem.key.shape[2]
    reach, offset = problem.max_span - 1, problem.query_offset
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = stop + offset if problem.is_causal else stop + offset + reach
        # A window that lies outside the keys still needs one column, all masked, to give zeros
        first = min(max(start + offset - reach, 0), num_keys - 1)
        blocks.append(_Block(start, stop, first, max(min(last, num_keys), first + 1)))
    return blocks


def _band(problem: FocusProblem, block: _Block) -> FocusProblem:
    names = (*problem.TENSORS, "attention_mask")
    parts = {name: block.of(name, getattr(problem, name)) for name in names}
    # From here on positions count from the band's first key
    return _unchecked(problem, **parts, query_offset=problem.query_offset + block.start - block.first)


def _unchecked(problem: FocusProblem, **changes: Any) -> FocusProblem:
    """`replace` without validating again: blocks of a valid problem are valid."""
    part = object.__new__(FocusProblem)
    part.__dict__.update(problem.__dict__, **changes)
    return part


def _solve(p: FocusProblem) -> FocusOutput:
    """One band, all iterations. Grouped heads stay grouped: the queries of a group are rows of one product."""
    dtype = p.compute_dtype
    batch, heads, length, _ = p.query.shape
    kv_heads, num_keys = p.key.shape[1:3]
    # The tanh of a soft cap stands between scale and temperature; without it both fold into the query
    rescale = p.sharpness.to(dtype)[..., None]
    fold = p.scaling if p.softcap is not None else p.scaling * rescale
    bias, empty = _band_bias(p)
    in_span = (bias > float("-inf")).sum(-1).clamp_min(1) if p.need_statistics else None
    if empty is not None:
        # A softmax over nothing is NaN; these queries see everything, and their output is set to zero
        bias = bias.masked_fill(empty, 0)

    # Half precision: products in the inputs' dtype, everything else in float32
    first_query = query = p.query.to(dtype)
    key = p.key.transpose(-1, -2)
    output = first_query.new_zeros(batch, heads, length, p.value.shape[-1])
    running = torch.ones(batch, heads, length, dtype=torch.bool, device=p.query.device)
    iterations = torch.zeros_like(running, dtype=torch.long)
    result, entropy, coverage = output, None, None
    update = [None if x is None else x.to(dtype) for x in (p.feedback_matrix, p.mix, p.gain)]
    grouped = (batch, kv_heads, heads // kv_heads * length, -1)
    for step in range(p.max_iterations):
        rows = (query * fold).to(p.key.dtype).reshape(grouped)
        scores = (rows @ key).view(batch, heads, length, num_keys).to(dtype)
        if p.softcap is not None:
            scores = p.softcap * torch.tanh(scores / p.softcap) * rescale
        weights = torch.softmax(scores + bias, dim=-1)
        if empty is not None:
            weights = weights.masked_fill(empty, 0)
        new_output = (weights.to(p.value.dtype).reshape(grouped) @ p.value).view(output.shape).to(dtype)
        new_output = torch.where(running[..., None], new_output, output)
        iterations = iterations + running
        converged = has_converged(new_output, output, p.stop, p.base_threshold, p.threshold_scale)
        stopping, running, output = running & converged, running & ~converged, new_output
        last = step == p.max_iterations - 1 or not _any(running)
        if p.need_statistics and (last or _any(stopping)):
            with torch.no_grad():
                new_entropy = torch.special.entr(weights).sum(-1)
                new_coverage = (weights > p.coverage_threshold).sum(-1) / in_span
                if entropy is None:
                    entropy, coverage = new_entropy, new_coverage
                else:
                    ends = stopping | running
                    entropy = torch.where(ends, new_entropy, entropy)
                    coverage = torch.where(ends, new_coverage, coverage)
        if p.readout_weights is not None:
            share = p.readout_weights[..., step:] if last else p.readout_weights[..., step : step + 1]
            result = result + share.to(dtype).sum(-1, keepdim=True) * output
        if last:
            break
        query = feed_back(query, first_query, output, *update, p.feedback, p.anchored)
    if p.readout_weights is None:
        result = output
    return FocusOutput(result.to(p.query.dtype), entropy, coverage, iterations)


def _band_bias(p: FocusProblem) -> tuple[Tensor, Tensor | None]:
    """What is added to the scores of a band in every iteration, (B, 1 or H, T, S); and which queries see no key at
    all, (B, 1 or H, T, 1), None where that cannot be."""
    distance = torch.arange(p.query.shape[2], device=p.key.device)[:, None] + p.query_offset
    distance = distance - torch.arange(p.key.shape[2], device=p.key.device)
    unreachable = distance.abs() >= p.max_span
    if p.is_causal:
        unreachable = unreachable | (distance < 0)
    distance = distance.abs().to(p.compute_dtype).masked_fill(unreachable, float("inf"))
    bias = _LogSpanMask.apply(p.span.to(p.compute_dtype)[..., None], distance, p.ramp)
    if p.position_bias is not None:
        bias = bias + p.position_bias
    if p.attention_mask is not None:
        bias = bias + p.additive_mask(p.attention_mask)
    elif 0 <= p.query_offset <= p.key.shape[2] - p.query.shape[2]:
        # Every query has its own key
        return bias, None
    return bias, (bias == float("-inf")).all(-1, keepdim=True)


def _solve_all(problem: FocusProblem, size: int) -> list[Tensor | None]:
    parts = [_solve(_band(problem, block)) for block in _blocks(problem, size)]
    return [torch.cat(part, dim=2) if part[0] is not None else None for part in zip(*parts, strict=True)]


def _any(flags: Tensor) -> bool:
    """Whether any flag is set, where reading that is free: on a CPU outside of compiled graphs. Elsewhere True, since
    the host would wait for the device."""
    free = flags.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    return not free or bool(flags.any())


class _LogSpanMask(torch.autograd.Function):
    """`log_weight(soft_span_mask(...))` in four passes over the band, and four back, where autograd takes twenty."""

    @staticmethod
    def forward(ctx: Any, span: Tensor, distance: Tensor, ramp: int) -> Tensor:
        """span z (B, H, T, 1), distance (T, S), inf where a key cannot be reached -> (B, H, T, S), −inf there."""
        bias = (span - (distance - ramp)).div_(ramp).clamp_(0, 1).log_()
        ctx.save_for_backward(bias, span, distance)
        ctx.ramp = ramp
        return bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        bias, span, distance = ctx.saved_tensors
        # On the edge m = (ramp + z − d)/ramp, and d(log m)/dz = 1/(ramp·m)
        flat = (distance < span) | (bias == float("-inf"))
        slope = torch.exp(-bias).mul_(grad).masked_fill_(flat, 0)
        return slope.sum(-1, keepdim=True) / ctx.ramp, None, None


class _Blocked(torch.autograd.Function):
    """All blocks, with a backward that solves each block again and adds up the gradients of shared keys in place."""

    @staticmethod
    def forward(ctx: Any, problem: FocusProblem, size: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        problem = _unchecked(problem, **dict(zip(FocusProblem.TENSORS, tensors, strict=True)))
        mask = problem.attention_mask
        ctx.save_for_backward(*tensors, mask if isinstance(mask, Tensor) else None)
        # The context must not hold the tensors a second time, out of autograd's sight
        ctx.settings = _unchecked(problem, **dict.fromkeys(FocusProblem.TENSORS))
        if isinstance(mask, Tensor):
            ctx.settings = _unchecked(ctx.settings, attention_mask=None)
        ctx.size = size
        joined = _solve_all(problem, size)
        ctx.mark_non_differentiable(*(x for x in joined[1:] if x is not None))
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FocusError("The blocked backend has no second derivative (create_graph=True); 'reference' has.")
        *tensors, mask = ctx.saved_tensors
        names = FocusProblem.TENSORS
        mask = ctx.settings.attention_mask if mask is None else mask
        problem = _unchecked(ctx.settings, **dict(zip(names, tensors, strict=True)), attention_mask=mask)
        problem = replace(problem, need_statistics=False)
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True) if needed]
        # Many blocks add into one key: sums are kept at full precision
        sums = {name: torch.zeros_like(getattr(problem, name), dtype=problem.compute_dtype) for name in wanted}
        for block in _blocks(problem, ctx.size):
            band = _band(problem, block)
            with torch.enable_grad():
                leaves = {name: getattr(band, name).detach().requires_grad_() for name in wanted}
                output = _solve(_unchecked(band, **leaves)).output
            grads = torch.autograd.grad(
                output, list(leaves.values()), grad[:, :, block.start : block.stop], allow_unused=True
            )
            for name, part in zip(wanted, grads, strict=True):
                if part is not None:
                    block.of(name, sums[name]).add_(part)
        grads = (sums[name].to(getattr(problem, name).dtype) if name in sums else None for name in names)
        return (None, None, *grads)


def focus_blocked(problem: FocusProblem, size: int = QUERY_BLOCK) -> FocusOutput:
    """Solve `problem` in blocks of `size` queries. Time O(T·(max_span + size)·iterations), memory O(T)."""
    if torch.compiler.is_compiling():
        # The compiler derives the backward, and decides itself what to recompute
        return FocusOutput(*_solve_all(problem, size))
    return FocusOutput(*_Blocked.apply(problem, size, *(getattr(problem, name) for name in FocusProblem.TENSORS)))
