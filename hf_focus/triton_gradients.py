"""What the fused backward kernel is made of: gradients of scores and spans, its scratch, and the gradient of F."""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

from .triton_tiles import dot, load_tile, narrow, quotient, store_tile


@triton.jit
def product_gradient(d_score, capped, sharp, scale, softcap):
    """From the gradient of the scores to that of q·k."""
    d_product = d_score * (sharp * scale)[:, None]
    if softcap is not None:
        d_product = d_product * (1.0 - (capped / softcap) * (capped / softcap))
    return d_product


@triton.jit
def span_gradient(d_score, start, rows, offset, spans, RAMP: tl.constexpr, PRECISION: tl.constexpr):
    """A tile's part of the gradient of the spans, (rows,): on the edge d(log m)/dz = 1/(ramp·m). At d = z, where it
    begins, the reference counts it too. The gradient of scores out of reach is 0."""
    at = start + tl.arange(0, d_score.shape[1])[None, :]
    far = tl.abs((rows + offset)[:, None] - at).to(tl.float32)
    left = RAMP + spans[:, None] - far
    edge = (left > 0) & (far >= spans[:, None])
    return tl.sum(tl.where(edge, quotient(d_score, tl.where(edge, left, 1.0), PRECISION), 0.0), 1)


@triton.jit
def kept_tile(kept, step, columns, BLOCK_Q: tl.constexpr):
    """What the scratch holds of one iteration, (BLOCK_Q, columns)."""
    SIZE: tl.constexpr = columns.shape[0]
    local = tl.arange(0, BLOCK_Q)
    return load_tile(kept + step * BLOCK_Q * SIZE, local, local < BLOCK_Q, columns, SIZE, 1, SIZE)


@triton.jit
def keep_tile(kept, step, columns, tile, BLOCK_Q: tl.constexpr):
    """`tile` into the scratch."""
    SIZE: tl.constexpr = columns.shape[0]
    local = tl.arange(0, BLOCK_Q)
    store_tile(kept + step * BLOCK_Q * SIZE, local, local < BLOCK_Q, columns, SIZE, 1, SIZE, tile)


@triton.jit
def add_matrix_gradient(
    d_matrix, output, d_fed, columns, value_columns, row_stride, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """oᵀ·∂(o·F), added to one head's (DV, D) at `d_matrix`, which other programs add to as well."""
    d_tile = dot(tl.trans(narrow(output, d_fed.dtype)), d_fed, None, PRECISION)
    # Of heads of 256 an asynchronous product of two groups of warps, see `triton_configs`: what it reads must stay
    tl.debug_barrier()
    places = value_columns[:, None] * row_stride + columns[None, :]
    exists = (value_columns < DV)[:, None] & (columns < D)[None, :]
    tl.atomic_add(d_matrix + places, d_tile, mask=exists, sem="relaxed")
