"""What the focus kernels share: loading tiles, span weights, masked scores, and the query's update, in Triton.

Scores are kept in units of log 2, for `exp2`, the logarithm of the span mask included. It is worked out in tiles at
an edge of some query's span alone: within all spans it is 0. Positions count among the keys.
"""

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import libdevice
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)
# The square root of the smallest normal number: under it a mean square counts as zero
UNIT_TINY = tl.constexpr(1.0842021724855044e-19)
# `masks.HIDDEN`: an additive mask at or under this says "never"
HIDDEN = tl.constexpr(-5e3)


@triton.jit
def load_tile(base, rows, valid, columns, row_stride, column_stride, SIZE: tl.constexpr):
    """Rows of a (rows, SIZE) matrix, 0 in rows that are not `valid` and in columns >= SIZE."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride
    seen = valid[:, None]
    if columns.shape[0] != SIZE:
        seen = seen & (columns < SIZE)[None, :]
    return tl.load(pointers, mask=seen, other=0.0)


@triton.jit
def key_tile(base, start, high, columns, strides, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys or values of one sequence and head from `start` on, (BLOCK_K, columns); 0 from `high` on."""
    keys = start + tl.arange(0, BLOCK_K)
    return load_tile(base, keys, keys < high, columns, strides[2], strides[3], SIZE)


@triton.jit
def store_tile(base, rows, valid, columns, row_stride, column_stride, SIZE: tl.constexpr, tile):
    """`tile` into the valid rows of a (rows, SIZE) matrix, in the matrix's dtype."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride
    seen = valid[:, None]
    if columns.shape[0] != SIZE:
        seen = seen & (columns < SIZE)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=seen)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` in `dtype`; float16 at its largest number instead of infinity, which would turn 0·x into NaN."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(dtype)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """a·b, added to `total` unless that is None, in float32.

    PRECISION: of float32 inputs, as `tl.dot` knows it, or "widened": the exact product of the rounded numbers, for
    Triton's interpreter, which multiplies the bits of bfloat16 numbers as if they were integers.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def key_range(
    span,
    valid,
    first_position,
    last_position,
    num_keys,
    MAX_SPAN: tl.constexpr,
    RAMP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The keys [low, high) that any query of a block can reach, from the spans that its queries really have."""
    widest = tl.minimum(tl.max(tl.where(valid, span, 0.0)), 1.0 * MAX_SPAN)
    reach = tl.minimum(tl.ceil(RAMP + widest).to(tl.int32), MAX_SPAN)
    low = tl.maximum(first_position - reach + 1, 0)
    return low, tl.minimum(last_position + (1 if CAUSAL else reach), num_keys)


@triton.jit
def on_plateau(
    start, high, first_position, last_position, narrowest, MAX_SPAN: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whether all queries of a block see all keys from `start` on with weight 1, none at the end of its span."""
    end = start + BLOCK_K - 1
    farthest = last_position - start
    exist = end < high
    if CAUSAL:
        exist = exist & (end <= first_position)
    else:
        farthest = tl.maximum(farthest, end - first_position)
    return exist & (farthest < MAX_SPAN) & (farthest < narrowest)


@triton.jit
def span_weight(distance, span, exists, MAX_SPAN: tl.constexpr, RAMP: tl.constexpr, CAUSAL: tl.constexpr):
    """m(d) = clamp((ramp + z − d)/ramp, 0, 1), and 0 for keys out of reach or that do not exist."""
    far = tl.abs(distance)
    weight = tl.minimum(tl.maximum((RAMP + span - far.to(tl.float32)) * (1.0 / RAMP), 0.0), 1.0)
    seen = exists & (far < MAX_SPAN)
    if CAUSAL:
        seen = seen & (distance >= 0)
    return tl.where(seen, weight, 0.0)


@triton.jit
def with_span(scores, weight, PRECISION: tl.constexpr):
    """Scores + log m(d), −inf where m(d) is 0, whatever the score. The logarithm takes one instruction, to 22 bits,
    where `tl.log2` takes a dozen; the interpreter does not know it."""
    # A conditional expression would look at both
    if PRECISION == "widened":  # noqa: SIM108
        logarithm = tl.log2(tl.maximum(weight, TINY))
    else:
        logarithm = libdevice.fast_log2f(weight)
    return tl.where(weight > 0, scores + logarithm, float("-inf"))


@triton.jit
def quotient(x, y, PRECISION: tl.constexpr):
    """x / y in two instructions, to 22 bits."""
    if PRECISION == "widened":
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def capped_product(product, scale, softcap):
    """What the sharpness multiplies, but for `row_factor`: q·k, or with a softcap its capped score."""
    if softcap is not None:
        return softcap * tanh(product * scale / softcap)
    return product


@triton.jit
def row_factor(sharpness, scale, softcap):
    """From `capped_product` to scores."""
    return sharpness if softcap is not None else sharpness * scale


@triton.jit
def masked_scores(
    capped,
    factor,
    plateau,
    distance,
    span,
    exists,
    rows,
    columns,
    mask,
    mask_strides,
    bias,
    bias_strides,
    MAX_SPAN: tl.constexpr,
    RAMP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDITIVE_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores in units of log 2, log m(d) included: −inf where a span ends or a mask hides.

    capped: `capped_product`, of any shape; factor, distance, span, exists, rows, columns: broadcastable to it;
    plateau: m(d) is 1 everywhere, and not worked out but for a mask or bias, which are read only where it is positive:
    a mask may be stored as the band alone. What is read does not wait for the product: there a pipelined loop ends.
    """
    scores = capped * (factor * LOG2_E)
    if mask is None and bias is None:
        if not plateau:
            scores = with_span(scores, span_weight(distance, span, exists, MAX_SPAN, RAMP, CAUSAL), PRECISION)
    else:
        weight = span_weight(distance, span, exists, MAX_SPAN, RAMP, CAUSAL)
        scores = with_span(scores, weight, PRECISION)
        if bias is not None:
            places = bias + rows.to(tl.int64) * bias_strides[2] + columns.to(tl.int64) * bias_strides[3]
            scores += tl.load(places, mask=weight > 0, other=0.0).to(tl.float32) * LOG2_E
        if mask is not None:
            places = mask + rows.to(tl.int64) * mask_strides[2] + columns.to(tl.int64) * mask_strides[3]
            masked = tl.load(places, mask=weight > 0, other=0)
            if ADDITIVE_MASK:
                masked = masked.to(tl.float32)
                scores = tl.where(masked > HIDDEN, scores + masked * LOG2_E, float("-inf"))
            else:
                scores = tl.where(masked != 0, scores, float("-inf"))
    return scores


@triton.jit
def tile_scores(
    asking, tile, start, high, rows, offset, first_position, last_position, spans, narrowest, factor, mask,
    mask_strides, bias, bias_strides, scale, softcap, MAX_SPAN: tl.constexpr, RAMP: tl.constexpr, CAUSAL: tl.constexpr,
    ADDITIVE_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries on a tile of keys: scores, their `capped_product`, and whether it is `on_plateau`.

    asking: (rows, features); tile: (keys, features); rows, spans, factor: (rows,); first_position, last_position: of
    the block's queries, among the keys; narrowest: of all its spans.
    """
    BLOCK_K: tl.constexpr = tile.shape[0]
    at = start + tl.arange(0, BLOCK_K)[None, :]
    plateau = on_plateau(start, high, first_position, last_position, narrowest, MAX_SPAN, CAUSAL, BLOCK_K)
    capped = capped_product(dot(asking, tl.trans(tile), None, PRECISION), scale, softcap)
    scores = masked_scores(
        capped, factor[:, None], plateau, (rows + offset)[:, None] - at, spans[:, None], at < high, rows[:, None], at,
        mask, mask_strides, bias, bias_strides, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK, PRECISION,
    )  # fmt: skip
    return scores, capped, plateau


@triton.jit
def attend(scores, values, peak, total, summed, PRECISION: tl.constexpr):
    """One more tile of keys in a softmax under way: its peak, its total, and its sum of values."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Rows that see nothing must not subtract −inf from −inf
    zero = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(peak - zero)
    share = tl.exp2(scores - zero[:, None])
    summed = dot(narrow(share, values.dtype), values, summed * fade[:, None], PRECISION)
    return higher, total * fade + tl.sum(share, 1), summed


@triton.jit
def tanh(x):
    """From one exponential that cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def inverse_size(x, SIZE: tl.constexpr):
    """Inverse of the root mean square of the rows of `x`, of which SIZE columns are no padding; a column."""
    return tl.math.rsqrt(tl.sum(x * x, 1) / SIZE + UNIT_TINY)[:, None]


@triton.jit
def inverse_size_for_gradient(x, SIZE: tl.constexpr):
    """The same, 0 for rows of zeros: their direction has no derivative, and 10⁹ times a gradient is of no use."""
    square = tl.sum(x * x, 1) / SIZE
    return tl.where(square > 0, tl.math.rsqrt(square + UNIT_TINY), 0.0)[:, None]


@triton.jit
def unit_gradient(grad, direction, inverse, SIZE: tl.constexpr):
    """Gradient of x from that of its direction x·inverse."""
    return inverse * (grad - direction * (tl.sum(grad * direction, 1) / SIZE)[:, None])


@triton.jit
def rotation_tile(rotation, part, rows, valid, columns, strides, D: tl.constexpr):
    """Cosines (part 0) or sines (part 1) of some rows of one sequence, (rows, columns), float32."""
    return load_tile(rotation + part * strides[0], rows, valid, columns, strides[2], strides[3], D).to(tl.float32)


@triton.jit
def fed_back(
    output, matrix, rotation, rows, valid, columns, value_columns, matrix_strides, rotation_strides, D: tl.constexpr,
    DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """oᵗ·F, (rows, columns), rotated unless `rotation`, of one sequence, is None. `matrix` of one head: F, with a
    rotation F and F turned beside it (`iteration.turn`), (DV, 2·D); None: the identity, where both paddings are as
    wide. The rotation is read anew each time, which costs no registers."""
    if matrix is not None:
        narrowed = narrow(output, matrix.dtype.element_ty)
        exist = value_columns < DV
        tile = load_tile(matrix, value_columns, exist, columns, matrix_strides[1], matrix_strides[2], D)
        fed = dot(narrowed, tile, None, PRECISION)
        if rotation is not None:
            fed = fed * rotation_tile(rotation, 0, rows, valid, columns, rotation_strides, D)
            turning = matrix + D * matrix_strides[2]
            tile = load_tile(turning, value_columns, exist, columns, matrix_strides[1], matrix_strides[2], D)
            turned = dot(narrowed, tile, None, PRECISION)
            fed += turned * rotation_tile(rotation, 1, rows, valid, columns, rotation_strides, D)
    else:
        fed = tl.where((columns < D)[None, :], output, 0.0)
    # One return: of two, triton wants tiles of one shape, also where the other is never reached
    return fed


@triton.jit
def next_state(base, fed, alpha, D: tl.constexpr, NORMALIZED: tl.constexpr):
    """The next direction (normalised feedback) or query (additive)."""
    if NORMALIZED:
        mixed = (1.0 - alpha) * base + alpha * fed * inverse_size(fed, D)
        return mixed * inverse_size(mixed, D)
    return base + fed


@triton.jit
def head_number(pointer, head, DEFAULT: tl.constexpr):
    """A head's entry of a vector, or the default where there is none."""
    if pointer is not None:
        return tl.load(pointer + head).to(tl.float32)
    return DEFAULT
