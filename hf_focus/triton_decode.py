"""The fused kernel for one query a sequence: a decoded token, all iterations in one launch, without matrix products.

One program solves one query head. Splitting the span over programs, as decoding over a whole cache does, is not done:
each iteration ends in a softmax over the whole span and begins with the query made of it, so every iteration would
need its own exchange between programs (a launch, or a barrier over the grid, of some microseconds), to save a part
of reading at most max_span keys: 128 KiB at span 256 and head size 128, which is of the order of one microsecond.
After the first iteration they come from the L1 or L2 cache.
"""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

from .triton_tiles import (
    LN_2,
    TINY,
    UNIT_TINY,
    capped_product,
    head_number,
    key_range,
    load_tile,
    masked_scores,
    narrow,
    row_factor,
)


@triton.jit
def direction(x, SIZE: tl.constexpr):
    """A vector at root mean square 1."""
    return x * tl.math.rsqrt(tl.sum(x * x) / SIZE + UNIT_TINY)


@triton.jit
def fed_through(output, matrix, columns, value_columns, strides, D: tl.constexpr, DV: tl.constexpr):
    """o·F of one head, (columns,)."""
    tile = load_tile(matrix, value_columns, value_columns < DV, columns, strides[1], strides[2], D)
    return tl.sum(output[:, None] * tile.to(tl.float32), 0)


@triton.jit
def key_scores(
    asking, key, keys, high, columns, strides, position, span, sharp, mask, mask_strides, bias, bias_strides,
    scale, softcap, D: tl.constexpr, MAX_SPAN: tl.constexpr, RAMP: tl.constexpr, CAUSAL: tl.constexpr,
    ADDITIVE_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of some keys in units of log 2."""
    tile = load_tile(key, keys, keys < high, columns, strides[2], strides[3], D).to(tl.float32)
    capped, row = capped_product(tl.sum(tile * asking[None, :], 1), scale, softcap), tl.zeros_like(keys)
    return masked_scores(
        capped, row_factor(sharp, scale, softcap), False, position - keys, span, keys < high, row, keys, mask,
        mask_strides, bias, bias_strides, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK, PRECISION,
    )  # fmt: skip


# A cache that grows to a multiple of 16 is no reason for another kernel; strides that are one still are
@triton.jit(do_not_specialize=("num_keys", "offset"))
def decode_kernel(
    query, key, value, span, sharpness, readout, matrix, mix, gain, rotation, mask, bias,
    output, entropy, coverage, iterations,
    query_strides, key_strides, value_strides, span_strides, sharpness_strides, readout_strides, matrix_strides,
    rotation_strides, mask_strides, bias_strides, output_strides,
    heads, groups, num_keys, offset, max_iterations,
    scale, softcap, base_threshold, threshold_scale, coverage_threshold,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MAX_SPAN: tl.constexpr, RAMP: tl.constexpr, CAUSAL: tl.constexpr,
    NORMALIZED: tl.constexpr, ANCHORED: tl.constexpr, RELATIVE: tl.constexpr, ADDITIVE_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a (batch, head), with an online softmax over tiles of BLOCK_K keys; arguments as `forward_kernel`.

    `matrix` None is the identity, where both paddings are equally wide.
    """
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    kv_head = head // groups
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    if readout is not None:
        readout += batch * readout_strides[0] + head * readout_strides[1]
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1] + mask_strides[4]
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1] + bias_strides[4]

    one = tl.arange(0, 1)
    spans = tl.load(span + batch * span_strides[0] + head * span_strides[1] + one).to(tl.float32)
    sharp = tl.load(sharpness + batch * sharpness_strides[0] + head * sharpness_strides[1]).to(tl.float32)
    low, high = key_range(spans, one == 0, offset, offset, num_keys, MAX_SPAN, RAMP, CAUSAL)

    # The query is rounded to its dtype before it meets the keys, as in `forward_kernel`
    dtype = query.dtype.element_ty
    first = tl.load(query + columns * query_strides[3], mask=columns < D, other=0.0).to(tl.float32)
    asking = first
    alpha = head_number(mix, head, 0.5)
    grown = tl.sqrt(tl.sum(first * first) / D + TINY) * head_number(gain, head, 1.0)
    if NORMALIZED:
        first = direction(first, D)
    state = first
    attended = tl.zeros([BLOCK_DV], tl.float32)
    result = tl.zeros([BLOCK_DV], tl.float32)
    peak, total = float("-inf"), 0.0
    step, going = 0, 1
    while going > 0:
        peak, total = float("-inf"), 0.0
        summed = tl.zeros([BLOCK_DV], tl.float32)
        for start in range(low, high, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            score = key_scores(
                asking, key, keys, high, columns, key_strides, offset, spans, sharp, mask, mask_strides, bias,
                bias_strides, scale, softcap, D, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK, PRECISION,
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(score))
            zero = tl.where(higher == float("-inf"), 0.0, higher)
            fade = tl.exp2(peak - zero)
            share = tl.exp2(score - zero)
            total = total * fade + tl.sum(share)
            tile = load_tile(value, keys, keys < high, value_columns, value_strides[2], value_strides[3], DV)
            summed = summed * fade + tl.sum(share[:, None] * tile.to(tl.float32), 0)
            peak = higher
        previous = attended
        attended = summed / tl.where(total == 0, 1.0, total)
        change = tl.sum(tl.abs(attended - previous)) / DV
        if RELATIVE:
            change = change / tl.maximum(tl.sum(tl.abs(attended)) / DV, TINY)
        stopped = change < base_threshold + threshold_scale * change
        if readout is not None:
            result += tl.load(readout + step * readout_strides[3]).to(tl.float32) * attended
        step += 1
        going = (step < max_iterations).to(tl.int32) * (stopped == 0).to(tl.int32)
        if going > 0:
            if matrix is not None:
                f_base = matrix + head * matrix_strides[0]
                fed = fed_through(attended, f_base, columns, value_columns, matrix_strides, D, DV)
                if rotation is not None:
                    turning = f_base + D * matrix_strides[2]
                    turned = fed_through(attended, turning, columns, value_columns, matrix_strides, D, DV)
                    cos = rotation + batch * rotation_strides[1] + columns * rotation_strides[3]
                    fed = fed * tl.load(cos, mask=columns < D, other=0.0).to(tl.float32)
                    sines = tl.load(cos + rotation_strides[0], mask=columns < D, other=0.0).to(tl.float32)
                    fed += turned * sines
            else:
                fed = tl.where(columns < D, attended, 0.0)
            base = first if ANCHORED else state
            if NORMALIZED:
                state = direction((1.0 - alpha) * base + alpha * direction(fed, D), D)
                asking = state * grown
            else:
                state = base + fed
                asking = state
            asking = narrow(asking, dtype).to(tl.float32)

    tl.store(iterations + row, step)
    if readout is not None:
        while step < max_iterations:
            result += tl.load(readout + step * readout_strides[3]).to(tl.float32) * attended
            step += 1
    else:
        result = attended
    output += batch * output_strides[0] + head * output_strides[1]
    tl.store(output + value_columns * output_strides[3], narrow(result, dtype), mask=value_columns < DV)

    if entropy is not None:
        disorder, covered, seen = 0.0, 0.0, 0.0
        for start in range(low, high, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            score = key_scores(
                asking, key, keys, high, columns, key_strides, offset, spans, sharp, mask, mask_strides, bias,
                bias_strides, scale, softcap, D, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK, PRECISION,
            )  # fmt: skip
            zero = tl.where(peak == float("-inf"), 0.0, peak)
            share = tl.exp2(score - zero) / tl.where(total == 0, 1.0, total)
            disorder -= tl.sum(tl.where(share > 0, share * tl.log2(tl.where(share > 0, share, 1.0)), 0.0))
            covered += tl.sum((share > coverage_threshold).to(tl.float32))
            seen += tl.sum((score > float("-inf")).to(tl.float32))
        tl.store(entropy + row, disorder * LN_2)
        tl.store(coverage + row, covered / tl.maximum(seen, 1.0))
