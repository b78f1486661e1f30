"""`focus_attention`: iterated local attention over a soft span, by whichever backend is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .band_mask import BandMask
from .differentiable import run
from .masks import gather_reach
from .problem import FocusOutput, FocusProblem, without_autocast

# A context variable, so that threads do not see each other's
_KEPT: ContextVar[list[FocusProblem] | None] = ContextVar("focus_problems", default=None)


@contextmanager
def keep_problems() -> Iterator[list[FocusProblem]]:
    """A list that every problem solved inside the `with`, in this context, is appended to before it is solved."""
    token = _KEPT.set([])
    try:
        yield _KEPT.get()
    finally:
        _KEPT.reset(token)


def focus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    *,
    temperature: Tensor | None = None,
    readout_weights: Tensor | None = None,
    feedback_matrix: Tensor | None = None,
    mix: Tensor | None = None,
    gain: Tensor | None = None,
    rotation: Tensor | None = None,
    attention_mask: Tensor | BandMask | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    query_offset: int | Tensor | None = None,
    max_span: int = 256,
    ramp: int = 2,
    max_iterations: int = 4,
    feedback: str = "normalized",
    anchored: bool = False,
    rotary_pairs: str = "halves",
    stop: str = "absolute",
    base_threshold: float = 1e-4,
    threshold_scale: float = 0.1,
    coverage_threshold: float = 0.01,
    need_statistics: bool = True,
    backend: str = "auto",
) -> FocusOutput:
    """The local branch of FocusA (the seed's `slide_win` and `_focus`).

    For t = 0 … max_iterations − 1, with q⁰ = query: oᵗ = softmax(qᵗ·kᵀ·scaling/τ + log m(d))·v, then
    qᵗ⁺¹ = update(qᵗ, oᵗ·F). A query whose output stopped changing keeps its last oᵗ. Each query is on its own: its
    result depends on nothing but the keys it sees.

    Args:
        query: (B, H, T, D), floating point.
        key: (B, Hkv, S, D); Hkv divides H (grouped-query attention).
        value: (B, Hkv, S, Dv); Dv may differ from D.
        span: z (B, H or 1, T): how many tokens away, in tokens, keys keep their full weight.
        temperature: τ > 0 (B, H or 1, T); None: 1.
        readout_weights: λ (B, H, T, max_iterations): the result is Σₜ λₜ·oᵗ; None: the last oᵗ.
        feedback_matrix, mix, gain: F (H, Dv, D), α (H,), gain (H,), see `iteration.feed_back`.
        rotation: cosines and sines of the queries' rotary positions, (2, B or 1, T, R), by which what is fed back is
            rotated, see `iteration.rotate`; None: it is not. Not differentiated.
        attention_mask: broadcastable to (B, H, T, S); bool (True: may be seen) or added to the scores; or a
            `BandMask`.
        position_bias: broadcastable to (B, H, T, S), added to the scores; differentiable.
        is_causal: see only keys at or before the query's position; else as far on either side.
        scaling: of the scores; None: D ** -0.5.
        softcap: c in c·tanh(scores/c), before the temperature (Gemma 2); None: no cap.
        query_offset: position among the keys of the first query; an int, or a 0-dimensional integer tensor (static
            caches), which is never read on the host. None: S − T if causal, else 0.
        max_span: no key at this distance or further is seen.
        ramp: width in tokens of the soft edge of the span.
        rotary_pairs: of features, that `rotation` rotates together: `"halves"` or `"neighbours"`.
        max_iterations, feedback, anchored, stop, base_threshold, threshold_scale, coverage_threshold: see
            `FocusConfig`.
        need_statistics: whether entropy and coverage are computed.
        backend: a name in `backends.BACKENDS`, or `"auto"`: the fastest that can solve this.

    Returns:
        `FocusOutput`: output (B, H, T, Dv), entropy, coverage, iterations.

    Raises:
        FocusConfigError: shapes that do not fit together, an unknown option, or a backend that cannot run here.
    """
    length, num_keys = query.shape[2], key.shape[2]
    if query_offset is None:
        query_offset = num_keys - length if is_causal else 0
    if isinstance(query_offset, Tensor):
        key, value, attention_mask, position_bias, query_offset = gather_reach(
            key, value, attention_mask, position_bias, query_offset, length, max_span, is_causal
        )
    problem = FocusProblem(
        query=query,
        key=key,
        value=value,
        span=span,
        sharpness=torch.ones_like(span) if temperature is None else temperature.reciprocal(),
        readout_weights=readout_weights,
        feedback_matrix=feedback_matrix,
        mix=mix,
        gain=gain,
        rotation=rotation,
        attention_mask=attention_mask,
        position_bias=position_bias,
        is_causal=is_causal,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        query_offset=query_offset,
        max_span=max_span,
        ramp=ramp,
        max_iterations=max_iterations,
        feedback=feedback,
        anchored=anchored,
        rotary_pairs=rotary_pairs,
        stop=stop,
        base_threshold=base_threshold,
        threshold_scale=threshold_scale,
        coverage_threshold=coverage_threshold,
        need_statistics=need_statistics,
    )
    if not torch.compiler.is_compiling() and (kept := _KEPT.get()) is not None:
        kept.append(problem)
    with without_autocast(query):
        return run(problem, backend)
