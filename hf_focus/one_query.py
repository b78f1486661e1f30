"""Focus attention of one causal query a sequence, a decoded token, on a CPU: few operations, as each takes longer to
start than to do."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .cells import MOST_SCORES, reads_are_free, without_empty_rows
from .iteration import has_converged, turn, unit
from .masks import read_mask
from .problem import FocusOutput, FocusProblem


def is_one_query(problem: FocusProblem) -> bool:
    """Whether a problem is one that `solve_one_query` is for: it holds all scores at once, and reads on the host how
    long the spans are."""
    batch, heads, length = problem.query.shape[:3]
    one = length == 1 and batch > 0 and problem.is_causal and not problem.need_statistics
    if not one or not reads_are_free(problem.query):
        return False
    return batch * heads * min(problem.max_span, problem.key.shape[2]) <= MOST_SCORES["cpu"]


def solve_one_query(problem: FocusProblem) -> FocusOutput:
    """Solve `problem`, which `is_one_query`. Inside, queries and outputs are (B, H, D): there is no T."""
    p, dtype = problem, problem.compute_dtype
    batch, heads = p.query.shape[:2]
    (key, value), bias, empty = _read_keys(p)
    pairs, group, num_keys = batch * key.shape[1], heads // key.shape[1], key.shape[2]
    key, value = key.to(dtype).flatten(0, 1).transpose(1, 2), value.to(dtype).flatten(0, 1)
    bias = bias.expand(batch, heads, 1, num_keys).reshape(pairs, group, num_keys)
    sharpness = p.sharpness.to(dtype)
    # The tanh of a soft cap stands between scale and temperature; without it both fold into the query
    fold = p.scaling * sharpness if p.softcap is None else p.scaling
    cap = None if p.softcap is None else (p.softcap * sharpness).expand(batch, heads, 1).reshape(pairs, group, 1)

    def attend(query: Tensor) -> Tensor:
        rows = query.reshape(pairs, group, query.shape[-1])
        if p.softcap is None:
            scores = torch.baddbmm(bias, rows, key)
        else:
            capped = torch.bmm(rows, key).div_(p.softcap).tanh_()
            scores = torch.addcmul(bias, capped, cap)
        weights = scores.softmax(dim=-1)
        if empty is not None:
            weights.view(batch, heads, num_keys).masked_fill_(empty, 0)
        return torch.bmm(weights, value).view(batch, heads, value.shape[-1])

    query = p.query.squeeze(2).to(dtype)
    advance = _feedback(p, query, fold)
    stops, outputs, running = p.base_threshold > 0 or p.threshold_scale >= 1, [], None
    iterations = torch.full((batch, heads, 1), p.max_iterations, device=query.device)
    query = query * fold
    for step in range(p.max_iterations):
        output = attend(query)
        if running is not None:
            output = torch.where(running, output, outputs[-1])
        outputs.append(output)
        if step == p.max_iterations - 1:
            break
        if stops:
            change = (output if step == 0 else output - outputs[-2]).abs().mean(dim=-1, keepdim=True)
            size = output.abs().mean(dim=-1, keepdim=True) if p.stop == "relative" else change
            ending = has_converged(change, size, p.stop, p.base_threshold, p.threshold_scale)
            ending = ending if running is None else ending & running
            if ending.any():
                iterations.masked_fill_(ending, step + 1)
                running = ~ending if running is None else running & ~ending
                if not running.any():
                    break
        query = advance(output)
    if p.readout_weights is None:
        result = outputs[-1][:, :, None]
    else:
        # The last output stands for the iterations that were not made
        outputs += outputs[-1:] * (p.max_iterations - len(outputs))
        result = p.readout_weights.to(dtype) @ torch.stack(outputs, dim=2)
    return FocusOutput(result.to(p.query.dtype), None, None, iterations)


def _read_keys(p: FocusProblem) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """Keys and values in reach; what is added to their scores, (B or 1, H or 1, 1, S); and which queries see none,
    (B or 1, H or 1, 1), None where that cannot be."""
    own, num_keys = p.query_offset, p.key.shape[2]
    shortest, longest = (end.item() for end in p.span.aminmax())
    # m(d) > 0 up to d < z + ramp. A span that is no number hides nothing
    reach = p.max_span - 1
    if longest < reach:
        reach = min(reach, math.ceil(max(longest, 0) + p.ramp))
    first = max(own - reach, 0)
    seen = slice(first, max(own + 1, 0))
    key, value = p.key[:, :, seen], p.value[:, :, seen]
    distance = torch.arange(own - first, own - first - key.shape[2], -1, device=key.device)
    # log(m) as log1p(m − 1), which is fast at m = 0, where log is not
    bias = (p.span.to(p.compute_dtype)[..., None] - distance).div_(p.ramp).clamp_(-1, 0).log1p_()
    if p.position_bias is None and p.attention_mask is None and shortest >= 0 and 0 <= own < num_keys:
        return (key, value), bias, None
    if p.position_bias is not None:
        bias = bias + read_mask(p.position_bias, slice(None), seen)
    if p.attention_mask is not None:
        bias = bias + p.additive_mask(read_mask(p.attention_mask, slice(None), seen))
    bias, empty = without_empty_rows(bias)
    return (key, value), bias, None if empty is None else empty[..., 0]


def _feedback(p: FocusProblem, query: Tensor, fold: float | Tensor) -> Callable[[Tensor], Tensor]:
    """`iteration.feed_back`: output (B, H, Dv) -> the next query (B, H, D), times `fold`."""
    dtype, head_dim = query.dtype, query.shape[-1]
    matrix = None if p.feedback_matrix is None else p.feedback_matrix.to(dtype)
    rotate = _rotation(p, dtype)

    def feed(output: Tensor) -> Tensor:
        if matrix is None:
            missing = head_dim - output.shape[-1]
            fed = torch.nn.functional.pad(output, (0, missing)) if missing >= 0 else output[..., :head_dim]
        else:
            fed = torch.bmm(output.transpose(0, 1), matrix).transpose(0, 1)
        return fed if rotate is None else rotate(fed)

    if p.feedback == "additive":
        base = query

        def advance(output: Tensor) -> Tensor:
            nonlocal base
            following = base + feed(output)
            base = base if p.anchored else following
            return following * fold

        return advance

    base = unit(query)
    alpha = query.new_full((1, 1), 0.5) if p.mix is None else p.mix.to(dtype)[:, None]
    size = query.square().mean(dim=-1, keepdim=True).sqrt() * fold
    size = size if p.gain is None else size * p.gain.to(dtype)[:, None]

    def advance(output: Tensor) -> Tensor:
        nonlocal base
        direction = unit(torch.lerp(base, unit(feed(output)), alpha))
        base = base if p.anchored else direction
        return direction * size

    return advance


def _rotation(p: FocusProblem, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """`iteration.rotate` of (B, H, D); None where the problem has no rotation."""
    if p.rotation is None:
        return None
    cos, sin = p.rotation.to(dtype).unbind()
    size = cos.shape[-1]
    # What `turn` makes of x is x with its pairs exchanged, times what it makes of ones
    sin = sin * turn(torch.ones_like(sin), p.rotary_pairs)

    def exchange(x: Tensor) -> Tensor:
        if p.rotary_pairs == "halves":
            return x.roll(size // 2, dims=-1)
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    def rotate(x: Tensor) -> Tensor:
        if size == x.shape[-1]:
            return torch.addcmul(x * cos, exchange(x), sin)
        moved, rest = x[..., :size], x[..., size:]
        return torch.cat([torch.addcmul(moved * cos, exchange(moved), sin), rest], dim=-1)

    return rotate
