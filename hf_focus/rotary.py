"""Rotary positions (2104.09864): the rotation of some queries, and how a model's own function lays it out."""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .iteration import ROTARY_PAIRS, rotate

# Of the angles that are not the model's, as in most models
BASE = 10_000.0


class Rotation(NamedTuple):
    """Of some queries.

    cos, sin: (B or 1, T, R), or R/2 of them. The first R of a head's features are rotated, the others stay.
    pairs: which features are rotated together, see `iteration.turn`.
    angles: how `cos` and `sin` hold them: `"each"` feature's, `"twice"` (their second half is not read, and an angle
        is that of two neighbours) or `"once"` a pair.
    """

    cos: Tensor
    sin: Tensor
    pairs: str = "halves"
    angles: str = "each"

    @property
    def values(self) -> Tensor:
        """Cosines and sines of each of the R features, (2, B or 1, T, R)."""
        both = torch.stack([self.cos, self.sin])
        if self.angles == "each":
            return both
        once = both if self.angles == "once" else both[..., : both.shape[-1] // 2]
        return torch.cat([once, once], dim=-1) if self.pairs == "halves" else once.repeat_interleave(2, dim=-1)

    def fast(self, share: float) -> "Rotation":
        """Of the first `share` of the pairs alone, which turn fastest: the others get angles of 0."""
        return self._only(~self._slow_angles(share))

    def slow(self, share: float) -> "Rotation":
        """Of all pairs but those of `fast`."""
        return self._only(self._slow_angles(share))

    def _slow_angles(self, share: float) -> Tensor:
        size = self.cos.shape[-1]
        pairs = size if self.angles == "once" else size // 2
        place = torch.arange(size, device=self.cos.device)
        beside = self.angles == "each" and self.pairs == "neighbours"
        return (place // 2 if beside else place % pairs) >= round(share * pairs)

    def _only(self, kept: Tensor) -> "Rotation":
        return self._replace(cos=self.cos.masked_fill(~kept, 1.0), sin=self.sin.masked_fill(~kept, 0.0))


def rotate_slow_pairs(
    query: Tensor, key: Tensor, offset: int, rotation: Rotation, share: float
) -> tuple[Tensor, Tensor, Rotation]:
    """Queries (B, H, T, D) and keys (B, Hkv, S, D) whose slow pairs were not rotated, rotated in these by their places
    among the keys: scores depend on the distance.

    Args:
        offset: place of the first query.
        rotation: of the queries, as if all pairs had been rotated.
        share: of the pairs that were.

    Returns:
        Both, and the rotation of the queries that they have now.
    """
    values, pairs = rotation.values.to(query.device), rotation.pairs
    size, device = values.shape[-1], query.device
    frequency = BASE ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angle = torch.arange(key.shape[2], device=device)[None, :, None] * frequency
    of_keys = Rotation(angle.cos(), angle.sin(), pairs, "once").slow(share).values
    of_queries = of_keys[:, :, offset : offset + query.shape[2]]
    fast, (cos, sin) = Rotation(*values, pairs).fast(share), of_queries.to(values.dtype)
    # No pair is in both
    made = Rotation(fast.cos * cos, fast.sin + sin, pairs)
    return rotate(query, of_queries, pairs), rotate(key, of_keys, pairs), made


@cache
def find_layout(function: Callable[..., Any], size: int = 8) -> tuple[str, str] | None:
    """`pairs` and `angles` of a model's own function, found by what it does to numbers; None: something else.

    Args:
        function: of queries and keys, or one of them, (B, H, T, R), cos and sin (B, T, R or R/2). Whatever it raises
            makes it something else.
    """
    plain = {"dtype": torch.float32, "device": "cpu"}
    # A query a feature: what becomes of it is a row of the rotation's matrix
    features = torch.eye(size, **plain).to(**plain)[None, None]
    once = [torch.linspace(*ends, size // 2, **plain).to(**plain) for ends in ((0.2, 0.9), (0.3, 0.8))]
    once = [x.expand(1, size, -1) for x in once]
    for angles, pairs in product(("each", "twice", "once"), ROTARY_PAIRS):
        # Of two neighbours both are the same
        beside = angles == "each" and pairs == "neighbours"
        repeated = [x.repeat_interleave(2, dim=-1) if beside else x.repeat(1, 1, 2) for x in once]
        rotation = Rotation(*(once if angles == "once" else repeated), pairs, angles)
        expected = rotate(features, rotation.values, pairs)
        found = _try(function, features, rotation)
        if found is not None and found.shape == expected.shape and torch.allclose(found, expected):
            return pairs, angles
    return None


def _try(function: Callable[..., Any], features: Tensor, rotation: Rotation) -> Tensor | None:
    """What a function that may be anybody's makes of `features`; None: nothing of the kind."""
    try:
        # Some take queries and keys, some one of them
        together = "cos" not in list(inspect.signature(function).parameters)[:2]
        with torch.no_grad():
            found = function(*(features,) * (2 if together else 1), rotation.cos, rotation.sin)
        return (found[0] if together else found).to(features.dtype)
    except Exception:
        return None
