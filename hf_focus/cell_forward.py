"""All iterations of focus over one cell, forward."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Workspace, reads_are_free
from .iteration import has_converged
from .problem import FocusOutput, FocusProblem


def row_norm(x: Tensor) -> Tensor:
    """(..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def inverse_size(x: Tensor, epsilon: Tensor, norm: Tensor | None = None) -> Tensor:
    """(..., D) -> (..., 1): what `iteration.unit` multiplies by; `norm` of the rows, where it is known."""
    norm = row_norm(x) if norm is None else norm
    return torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()


@dataclass
class Trace:
    """What the backward of a cell reads, an entry an iteration; `fed` has one less, for the feedback between two."""

    weights: list[Tensor] = field(default_factory=list)
    capped: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    running: list[Tensor | None] = field(default_factory=list)
    fed: list["Fed"] = field(default_factory=list)


class Scaled(NamedTuple):
    """A direction (B, H, T, D) that is still to be brought to root mean square 1 by `inverse_size` (B, H, T, 1)."""

    vector: Tensor
    inverse_size: Tensor


class Fed(NamedTuple):
    """One normalized feedback: o·F and the next direction."""

    output: Scaled
    direction: Scaled


class CellTensors:
    """One cell's tensors, laid out for products: grouped heads stay grouped, their queries are rows of one product."""

    def __init__(self, p: FocusProblem, shared: Workspace) -> None:
        self.p, self.shared, self.buffers = p, shared, shared.buffers
        dtype = p.compute_dtype
        batch, heads, length = p.query.shape[:3]
        kv_heads, num_keys = p.key.shape[1:3]
        self.shape = (batch, heads, length)
        self.pairs = batch * kv_heads
        self.rows = heads // kv_heads * length
        self.query = p.query.to(dtype)
        self.key = self._flat("key", p.key)
        self.value = self._flat("value", p.value)
        bias, self.empty = shared.bias(p)
        self.in_span = self._count(bias) if p.need_statistics else None
        if bias.shape[:2] == (1, 1) and heads == kv_heads:
            self.bias = bias[0]
        else:
            self.bias = bias.expand(*self.shape, num_keys).reshape(self.pairs, self.rows, num_keys)
        sharpness = p.sharpness.to(dtype)[..., None]
        # The tanh of a soft cap stands between scale and temperature; without it both fold into the query
        self.fold = p.scaling * sharpness if p.softcap is None else sharpness.new_full((1, 1, 1, 1), p.scaling)
        self.cap = None if p.softcap is None else self.by_group(p.softcap * sharpness.expand(*self.shape, 1))
        self.matrix = (
            None if shared.matrix is None else shared.matrix.repeat(batch, 1, 1) if batch > 1 else shared.matrix
        )
        self.mix, self.gain = shared.mix, shared.gain

    def by_group(self, x: Tensor) -> Tensor:
        """(B, H, T, …) -> (B·Hkv, H/Hkv·T, …)."""
        return x.reshape(self.pairs, self.rows, x.shape[-1])

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Scalar product over the last dimension, kept. As a matrix product: over few features that is faster."""
        return torch.mul(a, b, out=self.buffers("product", *a.shape)) @ self.shared.ones(a.shape[-1])

    def feed(self, output: Tensor, buffer: Tensor) -> Tensor:
        """o·F, rotated if the problem says so, (B, H, T, D), in `buffer`."""
        fed = buffer if self.p.rotation is None else self.buffers("straight", *buffer.shape)
        if self.matrix is None:
            shared = min(output.shape[-1], fed.shape[-1])
            fed[..., :shared] = output[..., :shared]
            fed[..., shared:] = 0
        else:
            torch.bmm(output.flatten(0, 1), self.matrix, out=fed.flatten(0, 1))
        return fed if self.p.rotation is None else self.rotate(fed, buffer)

    def rotate(self, x: Tensor, out: Tensor, back: bool = False) -> Tensor:
        """`iteration.rotate` of `x` (B, H, T, D), in `out`; `back`: its transpose."""
        cos, from_others, from_ones = self._rotation
        size = cos.shape[-1]
        ones, others = self._pairs
        if back:
            from_others, from_ones = from_ones, from_others
        torch.mul(x[..., :size], cos, out=out[..., :size])
        out[..., ones].addcmul_(x[..., others], from_others)
        out[..., others].addcmul_(x[..., ones], from_ones)
        out[..., size:] = x[..., size:]
        return out

    @cached_property
    def _rotation(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines (B or 1, 1, T, R), and with which sines each of two features that turn together enters the other's
        place, (B or 1, 1, T, R/2)."""
        cos, sin = self.p.rotation.to(self.query.dtype)[:, :, None]
        ones, others = self._pairs
        return cos, -sin[..., ones], sin[..., others]

    @cached_property
    def _pairs(self) -> tuple[slice, slice]:
        """The features that turn together: the ones, and the others in the same order."""
        size = self.p.rotation.shape[-1]
        if self.p.rotary_pairs == "halves":
            return slice(size // 2), slice(size // 2, size)
        return slice(0, size, 2), slice(1, size, 2)

    @cached_property
    def first(self) -> Scaled:
        """The first query, as a direction where the feedback is one of directions."""
        normalized = self.p.feedback == "normalized"
        return Scaled(self.query, inverse_size(self.query, self.shared.epsilon, self._norm) if normalized else None)

    @cached_property
    def size(self) -> Tensor:
        """Root mean square of the first query, (B, H, T, 1)."""
        return self._norm.square().div_(self.query.shape[-1]).add_(torch.finfo(self._norm.dtype).tiny).sqrt_()

    @cached_property
    def _norm(self) -> Tensor:
        return row_norm(self.query)

    def _flat(self, name: str, x: Tensor) -> Tensor:
        """(B, Hkv, S, D) -> (B·Hkv, S, D) in the compute dtype; a view where that is one."""
        mergeable = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        if x.dtype == self.p.compute_dtype and x.stride(-1) == 1 and mergeable:
            return x.flatten(0, 1)
        return self.buffers(name, *x.shape).copy_(x).flatten(0, 1)

    def _count(self, bias: Tensor) -> Tensor:
        visible = torch.gt(bias, float("-inf"), out=self.buffers("scratch", *bias.shape)).sum(-1)
        return visible if self.empty is None else visible.masked_fill(self.empty[..., 0], 1)


def solve_cell(c: CellTensors, trace: Trace | None = None) -> FocusOutput:
    """All iterations of one cell. `output` is a buffer that the next cell overwrites.

    Args:
        trace: filled, if given, with what the backward reads; it too holds buffers.
    """
    p, buffers, free = c.p, c.buffers, reads_are_free(c.query)
    stops = p.base_threshold > 0 or p.threshold_scale >= 1
    feed = _Feedback(c, trace)
    statistics = _Statistics(c) if p.need_statistics else None
    iterations = torch.full(c.shape, p.max_iterations, device=c.query.device)
    result = buffers("result", *c.shape, p.value.shape[-1])
    rows = torch.mul(c.query, c.fold, out=_buffer(c, "rows", 0, trace, *c.query.shape))
    running = output = None
    for step in range(p.max_iterations):
        last, previous = step == p.max_iterations - 1, output
        # Backward reads no output that nothing is fed from and whose share is fixed
        unread = last and trace is not None and p.readout_weights is None
        weights, output = _attend(c, rows, step, trace, not unread)
        if running is not None and not unread:
            torch.where(running[..., None], output, previous, out=output)
        if trace is not None:
            trace.running.append(running)
        ending = None
        if stops and not last:
            ending = _converged(c, output, previous)
            ending = ending if running is None else ending & running
            if free and not bool(ending.any()):
                ending = None
            else:
                iterations.masked_fill_(ending, step + 1)
                still = ~ending if running is None else running & ~ending
                last = free and not bool(still.any())
                running = running if last else still
        if statistics is not None and (last or ending is not None):
            statistics.read(weights, running if last else ending)
        if p.readout_weights is not None:
            # The last output stands for the iterations that are not made
            share = p.readout_weights[..., step:] if last else p.readout_weights[..., step : step + 1]
            share = share if share.shape[-1] == 1 else share.sum(-1, keepdim=True)
            result = torch.mul(output, share, out=result) if step == 0 else result.addcmul_(output, share)
        if last:
            break
        rows = feed(output, step)
    if p.readout_weights is None:
        result = output
    entropy, coverage = (None, None) if statistics is None else (statistics.entropy, statistics.coverage)
    return FocusOutput(result, entropy, coverage, iterations)


def _converged(c: CellTensors, output: Tensor, previous: Tensor | None) -> Tensor:
    """Which queries stop, (B, H, T); before the first iteration the output is 0."""
    p, width = c.p, output.shape[-1]
    difference = c.buffers("product", *output.shape)
    torch.abs(output if previous is None else torch.sub(output, previous, out=difference), out=difference)
    change = size = difference @ c.shared.ones(width) / width
    if p.stop == "relative" and previous is not None:
        size = torch.abs(output, out=difference) @ c.shared.ones(width) / width
    return has_converged(change, size, p.stop, p.base_threshold, p.threshold_scale)[..., 0]


def _buffer(c: CellTensors, name: str, step: int, trace: Trace | None, *shape: int) -> Tensor:
    """Memory that lasts to the next iteration but one, or to the end of a traced cell."""
    return c.buffers(f"{name}{step if trace is not None else step % 2}", *shape)


def _attend(
    c: CellTensors, rows: Tensor, step: int, trace: Trace | None, want_output: bool
) -> tuple[Tensor, Tensor | None]:
    """One attention: weights (B·Hkv, H/Hkv·T, S) and, if wanted, output (B, H, T, Dv)."""
    grouped, transposed = c.by_group(rows), c.key.transpose(1, 2)
    # One buffer of weights for all iterations stays in the cache
    scores = c.buffers(f"weights{step if trace is not None else 0}", c.pairs, c.rows, c.key.shape[1])
    if c.cap is None:
        torch.baddbmm(c.bias, grouped, transposed, out=scores)
    else:
        capped = torch.bmm(grouped, transposed, out=_buffer(c, "capped", step, trace, *scores.shape))
        capped.div_(c.p.softcap).tanh_()
        torch.mul(capped, c.cap, out=scores).add_(c.bias)
        if trace is not None:
            trace.capped.append(capped)
    weights = torch.softmax(scores, dim=-1, out=scores)
    if c.empty is not None:
        weights.view(*c.shape, -1).masked_fill_(c.empty, 0)
    output = None
    if want_output:
        output = _buffer(c, "output", step, trace, *c.shape, c.value.shape[-1])
        torch.bmm(weights, c.value, out=c.by_group(output))
    if trace is not None:
        trace.rows.append(rows)
        trace.weights.append(weights)
        trace.outputs.append(output)
    return weights, output


class _Feedback:
    """`iteration.feed_back`, from an output to the folded rows of the next product, in few passes over memory."""

    def __init__(self, c: CellTensors, trace: Trace | None) -> None:
        self.c, self.trace = c, trace
        self.normalized = c.p.feedback == "normalized"
        if c.p.max_iterations == 1:
            return
        self.base = c.first
        if self.normalized:
            self.size = c.size * c.gain * c.fold

    def __call__(self, output: Tensor, step: int) -> Tensor:
        c, shape = self.c, self.c.query.shape
        fed = c.feed(output, _buffer(c, "fed", step, self.trace, *shape))
        rows = _buffer(c, "rows", step + 1, self.trace, *shape)
        vector = _buffer(c, "vector", step, self.trace, *shape)
        if self.normalized:
            fed_size = inverse_size(fed, c.shared.epsilon)
            torch.mul(self.base.vector, c.shared.kept * self.base.inverse_size, out=vector)
            vector.addcmul_(fed, c.mix * fed_size)
            direction = Scaled(vector, inverse_size(vector, c.shared.epsilon))
            torch.mul(vector, direction.inverse_size * self.size, out=rows)
            if self.trace is not None:
                self.trace.fed.append(Fed(Scaled(fed, fed_size), direction))
        else:
            direction = Scaled(torch.add(self.base.vector, fed, out=vector), None)
            torch.mul(vector, c.fold, out=rows)
            if self.trace is not None:
                self.trace.fed.append(Fed(Scaled(fed, None), direction))
        if not c.p.anchored:
            self.base = direction
        return rows


class _Statistics:
    """Entropy and coverage of the last attention of each query, read from the weights at hand."""

    def __init__(self, c: CellTensors) -> None:
        self.c = c
        self.entropy = self.coverage = None

    def read(self, weights: Tensor, ending: Tensor | None) -> None:
        """Of the queries `ending` (B, H, T), None: all."""
        c = self.c
        if ending is not None and reads_are_free(weights):
            # Only their rows: a logarithm of all weights is as slow as the attention
            chosen = ending.flatten().nonzero()[:, 0]
            rows = weights.view(-1, weights.shape[-1])[chosen]
            if self.entropy is None:
                self.entropy, self.coverage = (c.in_span.new_zeros(c.shape) for _ in range(2))
            entropy, coverage = self._of(rows, c.in_span.expand(c.shape).flatten()[chosen], torch.empty_like(rows))
            self.entropy.view(-1)[chosen], self.coverage.view(-1)[chosen] = entropy, coverage
            return
        scratch = c.buffers("scratch", *c.shape, weights.shape[-1])
        entropy, coverage = self._of(weights.view(scratch.shape), c.in_span, scratch)
        if self.entropy is not None:
            entropy = torch.where(ending, entropy, self.entropy)
            coverage = torch.where(ending, coverage, self.coverage)
        self.entropy, self.coverage = entropy, coverage

    def _of(self, weights: Tensor, in_span: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        # Not `entr`, which is slow at zero
        logarithm = torch.clamp(weights, min=1e-30, out=scratch).log_()
        entropy = logarithm.mul_(weights).sum(-1).neg_()
        covered = torch.gt(weights, self.c.p.coverage_threshold, out=scratch).sum(-1)
        return entropy, covered / in_span
