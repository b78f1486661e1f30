"""What the fused backward kernel is made of: weights and their gradients, its scratch, and the gradient of F."""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

from .triton_tiles import dot, load_tile, masked_scores, narrow, span_weight, store_tile


@triton.jit
def attention_weights(
    asking,
    tile,
    at,
    high,
    rows,
    offset,
    spans,
    sharp,
    normalizer,
    mask,
    mask_strides,
    bias,
    bias_strides,
    scale,
    softcap,
    MAX_SPAN: tl.constexpr,
    RAMP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDITIVE_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p = 2^(score − normalizer)·m of one tile, with m and the scores before the sharpness."""
    product = dot(asking, tl.trans(tile), None, PRECISION)
    weight = span_weight((rows + offset)[:, None] - at, spans[:, None], at < high, MAX_SPAN, RAMP, CAUSAL)
    score, capped = masked_scores(
        product, weight, rows[:, None], at, sharp[:, None], mask, mask_strides, bias, bias_strides, scale, softcap,
        ADDITIVE_MASK,
    )  # fmt: skip
    return tl.exp2(score - normalizer[:, None]) * weight, weight, capped


@triton.jit
def product_gradient(d_score, capped, sharp, scale, softcap):
    """From the gradient of the scores to that of q·k."""
    d_product = d_score * sharp[:, None] * scale
    if softcap is not None:
        d_product = d_product * (1.0 - (capped / softcap) * (capped / softcap))
    return d_product


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
def query_of_step(
    query, states, step, grown, rows, valid, columns, strides, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """qᵗ: the query itself, or made of the state kept. Read anew where it is needed, which costs no registers."""
    if NORMALIZED:
        if step == 0:
            asked = load_tile(query, rows, valid, columns, strides[2], strides[3], D).to(tl.float32)
        else:
            asked = kept_tile(states, step, columns, BLOCK_Q) * grown
        return asked
    return kept_tile(states, step, columns, BLOCK_Q)


@triton.jit
def add_matrix_gradient(
    d_matrix, output, d_fed, columns, value_columns, row_stride, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """oᵀ·∂(o·F), added to one head's (DV, D) at `d_matrix`, which other programs add to as well."""
    d_tile = dot(tl.trans(narrow(output, d_fed.dtype)), d_fed, None, PRECISION)
    places = value_columns[:, None] * row_stride + columns[None, :]
    exists = (value_columns < DV)[:, None] & (columns < D)[None, :]
    tl.atomic_add(d_matrix + places, d_tile, mask=exists, sem="relaxed")
