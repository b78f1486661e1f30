"""Cells: the pieces that the blocked path cuts a problem into, each a few queries and the band of keys they reach."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .band_mask import BandMask
from .iteration import unit_epsilon
from .masks import read_mask
from .problem import FocusProblem, changed

# Queries of a cell and the most scores that it holds: measured, so that all iterations stay in a core's cache. A
# device without caches to fit wants fewer and larger launches. (Reach up to, heads of all rows from, queries): fewer
# where no span reaches far, since most of what a cell computes would be masked; the fewest where they have heads
# enough to be worth their launches
QUERY_BLOCKS = {"cpu": ((16, 32, 32), (64, 0, 64), (math.inf, 0, 96))}
OTHER_QUERY_BLOCK = 256
MOST_SCORES = {"cpu": 2**19}
OTHER_MOST_SCORES = 2**26
# Bands are as wide as the longest span in them asks for, in steps, so that cells of one shape are many
REACH_STEP = 32
NARROW = 64
NARROW_REACH_STEP = 8
# Shapes of cells at the start of a sequence differ, and return only in the next rows of the batch
MOST_BANDS = 32


@dataclass(frozen=True)
class Cell:
    """Rows of the batch, queries, and the keys that any of these queries can reach."""

    rows: slice
    queries: slice
    keys: slice

    def of(self, name: str, tensor: Tensor | BandMask | None) -> Tensor | None:
        """The part of a tensor of the problem that this cell reads: a view, or a lazy mask evaluated there."""
        if tensor is None or name in ("feedback_matrix", "mix", "gain"):
            return tensor
        if name == "rotation":
            return tensor[:, self.rows if tensor.shape[1] > 1 else slice(None), self.queries]
        if name in ("attention_mask", "position_bias"):
            return read_mask(tensor, self.queries, self.keys, self.rows)
        return tensor[self.rows, :, self.keys if name in ("key", "value") else self.queries]

    def cut(self, problem: FocusProblem) -> FocusProblem:
        """The problem of this cell alone; positions count from its first key."""
        parts = {name: self.of(name, getattr(problem, name)) for name in problem.ALL_TENSORS}
        return changed(problem, **parts, query_offset=problem.query_offset + self.queries.start - self.keys.start)


def reads_are_free(tensor: Tensor) -> bool:
    """Whether the host may look at a value: on a CPU outside of traced graphs. Elsewhere it would wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def without_empty_rows(bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is added to scores, (…, S), 0 for queries that see no key, whose softmax over nothing would be NaN: their
    weights are to be set to zero; and which those are, (…, 1), None where there are none."""
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    if reads_are_free(empty) and not bool(empty.any()):
        return bias, None
    return bias.masked_fill(empty, 0), empty


def query_block(device: str, reach: float, heads: int) -> int:
    """Queries of a cell on a type of device.

    Args:
        reach: the largest distance at which any query can see a key.
        heads: of all rows of the batch together.
    """
    fitting = (size for most, least, size in QUERY_BLOCKS.get(device, ()) if reach <= most and heads >= least)
    return next(fitting, OTHER_QUERY_BLOCK)


def cells(problem: FocusProblem, size: int | None = None, kept: int = 1) -> Iterator[Cell]:
    """Cut a problem into cells of at most `size` queries; None: what was measured to be fast.

    `kept` is of how many iterations the scores are held at once.
    """
    if not problem.span.numel():
        return
    device = problem.query.device.type
    batch, heads, length = problem.query.shape[:3]
    num_keys, offset, most = problem.key.shape[2], problem.query_offset, problem.max_span - 1
    reaches = _reach_of_queries(problem, most)
    size = size or query_block(device, most if reaches is None else reaches.amax().item(), batch * heads)
    blocks = [most] * -(-length // size) if reaches is None else _reach_of_blocks(reaches, size, most)
    for number, reach in enumerate(blocks):
        start, stop = number * size, min((number + 1) * size, length)
        last = stop + offset if problem.is_causal else stop + offset + reach
        # A window that lies outside the keys still needs one column, all masked, to give zeros
        first = min(max(start + offset - reach, 0), num_keys - 1)
        last = max(min(last, num_keys), first + 1)
        together = max(
            1, MOST_SCORES.get(device, OTHER_MOST_SCORES) // (heads * (stop - start) * (last - first) * kept)
        )
        for row in range(0, batch, together):
            yield Cell(slice(row, min(row + together, batch)), slice(start, stop), slice(first, last))


def _reach_of_queries(problem: FocusProblem, most: int) -> Tensor | None:
    """The largest distance, at most `most`, at which each query can see a key in any row and head, (T,); None: the
    host may not know."""
    if not reads_are_free(problem.span):
        return None
    longest = problem.span.detach().to(problem.compute_dtype).amax(dim=(0, 1))
    # m(d) > 0 up to d < z + ramp, and a span that is no number hides nothing
    return (longest + problem.ramp).nan_to_num(nan=most).clamp(0, most)


def _reach_of_blocks(reach: Tensor, size: int, most: int) -> list[int]:
    """The same for each block of `size` queries, in steps."""
    blocks = -(-len(reach) // size)
    reach = torch.nn.functional.pad(reach, (0, blocks * size - len(reach))).view(blocks, size).amax(dim=1)
    steps = torch.where(reach <= NARROW, NARROW_REACH_STEP, REACH_STEP)
    return ((reach / steps).ceil() * steps).clamp(0, most).long().tolist()


class Buffers:
    """Working memory by name, kept from cell to cell: on a CPU new memory is slower than the arithmetic."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like = like
        self.dtype = dtype
        self.memory: dict[str, Tensor] = {}
        self.views: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        views = self.views.setdefault(name, {})
        if shape not in views:
            size = math.prod(shape)
            if name not in self.memory or self.memory[name].numel() < size:
                views.clear()
                self.memory[name] = self.like.new_empty(size, dtype=self.dtype)
            views[shape] = self.memory[name][:size].view(shape)
        return views[shape]


class Workspace:
    """What the cells of one call share: buffers, the parameters in the compute dtype, and bands of one shape."""

    def __init__(self, problem: FocusProblem) -> None:
        dtype = problem.compute_dtype
        self.buffers = Buffers(problem.query, dtype)
        matrix, mix, gain = problem.feedback_matrix, problem.mix, problem.gain
        self.matrix = None if matrix is None else matrix.to(dtype)
        self.mix = problem.query.new_full((1, 1, 1), 0.5, dtype=dtype) if mix is None else mix.to(dtype)[:, None, None]
        self.gain = problem.query.new_ones(1, 1, 1, dtype=dtype) if gain is None else gain.to(dtype)[:, None, None]
        self.kept = 1 - self.mix
        self.epsilon = problem.query.new_full((1,), unit_epsilon(dtype), dtype=dtype)
        # Where each span reaches over all keys, no cell needs a mask of its own
        self.flat = reads_are_free(problem.span) and bool((problem.span >= problem.max_span - 1).all())
        # m(0) = 0 only where a span is negative
        self.owned = reads_are_free(problem.span) and not bool((problem.span < 0).any())
        self._ones: dict[int, Tensor] = {}
        self._bands: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def ones(self, size: int) -> Tensor:
        """(size, 1)."""
        if size not in self._ones:
            self._ones[size] = self.epsilon.new_ones(size, 1)
        return self._ones[size]

    def bias(self, p: FocusProblem) -> tuple[Tensor, Tensor | None]:
        """Of a cell's problem: the logarithm of the soft span mask, the position bias and the mask, broadcastable to
        (B, H, T, S); and which queries see no key, (B or 1, H or 1, T, 1), None where that cannot be."""
        # log(m) as log1p(m − 1), which is fast at m = 0, where log is not
        bias = self._band(p)[1] if self.flat else self.edge(p).clamp_(-1, 0).log1p_()
        if p.position_bias is not None:
            bias = bias + p.position_bias
        if p.attention_mask is not None:
            bias = bias + p.additive_mask(p.attention_mask)
        elif self.owned and p.position_bias is None and 0 <= p.query_offset <= p.key.shape[2] - p.query.shape[2]:
            # Every query has its own key
            return bias, None
        return without_empty_rows(bias)

    def edge(self, p: FocusProblem) -> Tensor:
        """(z − d)/ramp of a cell's keys, (B, H or 1, T, S): m − 1 before it is clamped to [−1, 0]."""
        scaled = (p.span.to(p.compute_dtype) / p.ramp)[..., None]
        distance = self._band(p)[0]
        return torch.sub(scaled, distance, out=self.buffers("edge", *p.span.shape, distance.shape[-1]))

    def _band(self, p: FocusProblem) -> tuple[Tensor, Tensor]:
        """Distances in ramps, inf where a key cannot be reached; and 0 or −inf for that: (T, S), (1, 1, T, S)."""
        length, num_keys = p.query.shape[2], p.key.shape[2]
        name = (p.query_offset, length, num_keys)
        if name not in self._bands:
            device = p.key.device
            distance = torch.arange(length, device=device)[:, None] + p.query_offset
            distance = distance - torch.arange(num_keys, device=device)
            unreachable = distance.abs() >= p.max_span
            if p.is_causal:
                unreachable = unreachable | (distance < 0)
            distance = distance.abs().to(p.compute_dtype).div_(p.ramp).masked_fill_(unreachable, float("inf"))
            bias = torch.zeros_like(distance).masked_fill_(unreachable, float("-inf"))
            if len(self._bands) == MOST_BANDS:
                self._bands.clear()
            self._bands[name] = distance, bias[None, None]
        return self._bands[name]
