"""The mathematics of one step of focus: soft span mask, feedback into the query, stop rule. Pure functions."""

from typing import NamedTuple

import torch
from torch import Tensor

FEEDBACKS = ("normalized", "additive")
STOPS = ("absolute", "relative")
ROTARY_PAIRS = ("halves", "neighbours")


def soft_span_mask(distance: Tensor, span: Tensor, ramp: int, max_span: int) -> Tensor:
    """Weight m(d) = clamp((ramp + z − d)/ramp, 0, 1) of a key at distance d (Adaptive Span, 1905.07799, eq. 5).

    Args:
        distance: distances in tokens, >= 0, broadcastable against `span`.
        span: z in tokens, >= 0.
        ramp: width of the soft edge in tokens.
        max_span: keys at this distance or further have weight 0 whatever the span is, which bounds the cost.

    Returns:
        Weights in [0, 1]; 1 at distance 0; differentiable with respect to `span` on the edge.
    """
    weight = ((ramp + span - distance) / ramp).clamp(0, 1)
    return weight.masked_fill(distance >= max_span, 0)


def log_weight(weight: Tensor) -> Tensor:
    """log(weight) with −inf and a zero gradient where the weight is 0; NaN stays NaN."""
    hidden = weight <= 0
    return torch.where(hidden, 1, weight).log().masked_fill(hidden, float("-inf"))


def unit_epsilon(dtype: torch.dtype) -> float:
    """What `unit` adds to a mean square: nothing, for any vector that is not zero."""
    return torch.finfo(dtype).tiny ** 0.5


def unit(x: Tensor) -> Tensor:
    """`x` (..., D) at root mean square 1; zero stays zero, with a finite gradient."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + unit_epsilon(x.dtype))


def turn(x: Tensor, pairs: str) -> Tensor:
    """Each pair of features of `x` (..., R) turned by a right angle: i and i + R/2 (`"halves"`), or 2·i and 2·i + 1
    (`"neighbours"`). Its transpose is its negative."""
    if pairs == "halves":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def rotate(x: Tensor, rotation: Tensor, pairs: str) -> Tensor:
    """`x` (B, H, T, D) at rotary positions (2104.09864).

    Args:
        rotation: cosines and sines, (2, B or 1, T, R): of the first R features; the others stay.
        pairs: see `turn`.
    """
    cos, sin = rotation.to(x.dtype)[:, :, None]
    moved, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat([moved * cos + turn(moved, pairs) * sin, rest], dim=-1)


def rotate_back(x: Tensor, rotation: Tensor, pairs: str) -> Tensor:
    """What `rotate` made `x` of, times the square of the angles' scale (1, but for YaRN)."""
    cos, sin = rotation
    return rotate(x, torch.stack([cos, -sin]), pairs)


class FedBack(NamedTuple):
    """The next query (B, H, T, D), and its direction at root mean square 1, None where the feedback keeps no norm."""

    query: Tensor
    direction: Tensor | None


def feed_back(
    last: FedBack,
    first_query: Tensor,
    output: Tensor,
    matrix: Tensor | None,
    mix: Tensor | None,
    gain: Tensor | None,
    feedback: str,
    anchored: bool,
    rotation: Tensor | None = None,
    rotary_pairs: str = "halves",
) -> FedBack:
    """The next query, qᵗ⁺¹ = update(qᵗ, oᵗ·F).

    `"additive"`: base + o·F (the seed; its norm grows), base the last query. `"normalized"`: the direction
    (1 − α)·base + α·o·F, both at equal size, at the norm of the first query times a gain; base is the last direction.
    With `anchored` base is the first query, or its direction.

    Args:
        last: the last step's query; the first query with direction None to begin with.
        first_query: (B, H, T, D).
        output: (B, H, T, Dv).
        matrix: F (H, Dv, D); None: the identity, cut or filled with zeros where Dv ≠ D.
        mix: α (H,) in (0, 1); None: one half. Read by `"normalized"` only.
        gain: (H,) > 0; None: one. Read by `"normalized"` only.
        rotation, rotary_pairs: what is fed back is rotated like this, see `rotate`; None: it is not.
    """
    if matrix is None:
        missing = first_query.shape[-1] - output.shape[-1]
        fed = torch.nn.functional.pad(output, (0, missing)) if missing >= 0 else output[..., :missing]
    else:
        fed = torch.einsum("bhtv,hvd->bhtd", output, matrix)
    if rotation is not None:
        fed = rotate(fed, rotation, rotary_pairs)
    if feedback == "additive":
        return FedBack((first_query if anchored else last.query) + fed, None)
    base = unit(first_query) if anchored or last.direction is None else last.direction
    alpha = 0.5 if mix is None else mix[:, None, None]
    direction = unit((1 - alpha) * base + alpha * unit(fed))
    # The tiny term is for the gradient at zero, where the root has none
    size = (first_query.square().mean(dim=-1, keepdim=True) + torch.finfo(first_query.dtype).tiny).sqrt()
    return FedBack(direction * (size if gain is None else size * gain[:, None, None]), direction)


def has_converged(change: Tensor, size: Tensor, stop: str, base_threshold: float, threshold_scale: float) -> Tensor:
    """Whether δ < base_threshold + threshold_scale·δ.

    Args:
        change: mean |oᵗ − oᵗ⁻¹| over a query's own features.
        size: mean |oᵗ|, of the same shape; read by `"relative"` only.
        stop: δ is the change (`"absolute"`, the seed), or the change as a share of the size (`"relative"`).
    """
    if stop == "relative":
        change = change / size.clamp_min(torch.finfo(size.dtype).tiny)
    return change < base_threshold + threshold_scale * change
