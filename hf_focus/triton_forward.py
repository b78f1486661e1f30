"""The fused forward kernel: all iterations of a block of queries in one program."""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

from .triton_tiles import (
    LN_2,
    TINY,
    attend,
    fed_back,
    head_number,
    inverse_size,
    key_range,
    key_tile,
    load_tile,
    narrow,
    next_state,
    row_factor,
    store_tile,
    tile_scores,
)


# A cache that grows to a multiple of 16 is no reason for another kernel; strides that are one still are
@triton.jit(do_not_specialize=("length", "num_keys", "offset"))
def forward_kernel(
    query,
    key,
    value,
    span,
    sharpness,
    readout,
    matrix,
    mix,
    gain,
    rotation,
    mask,
    bias,
    output,
    entropy,
    coverage,
    iterations,
    query_strides,
    key_strides,
    value_strides,
    span_strides,
    sharpness_strides,
    readout_strides,
    matrix_strides,
    rotation_strides,
    mask_strides,
    bias_strides,
    output_strides,
    heads,
    groups,
    length,
    num_keys,
    offset,
    max_iterations,
    scale,
    softcap,
    base_threshold,
    threshold_scale,
    coverage_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MAX_SPAN: tl.constexpr,
    RAMP: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ANCHORED: tl.constexpr,
    RELATIVE: tl.constexpr,
    ADDITIVE_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a (query block, batch and head), with an online softmax over tiles of BLOCK_K keys.

    A query that has stopped keeps its last query vector, so that repeating its attention repeats its output; its
    statistics are computed once, from that vector, after the loop. Every iteration reads the block's keys and values,
    after the first from L2, while it multiplies those read before: held on chip they took so much of it that fewer
    programs ran at once. The last of the five mask and bias strides is an offset in elements.
    """
    blocks = tl.cdiv(length, BLOCK_Q)
    block, head_row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    # As wide as the offsets that are made of them
    batch, head = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    kv_head = head // groups
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    valid = rows < length
    dtype = key.dtype.element_ty
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    span += batch * span_strides[0] + head * span_strides[1]
    sharpness += batch * sharpness_strides[0] + head * sharpness_strides[1]
    output += batch * output_strides[0] + head * output_strides[1]
    if readout is not None:
        readout += batch * readout_strides[0] + head * readout_strides[1]
    if matrix is not None:
        matrix += head * matrix_strides[0]
    if rotation is not None:
        rotation += batch * rotation_strides[1]
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1] + mask_strides[4]
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1] + bias_strides[4]

    # Rows beyond the last query see nothing: for them no mask may be read
    spans = tl.load(span + rows * span_strides[2], mask=valid, other=float("-inf")).to(tl.float32)
    sharp = tl.load(sharpness + rows * sharpness_strides[2], mask=valid, other=0.0).to(tl.float32)
    first_position = block * BLOCK_Q + offset
    last_position = tl.minimum(block * BLOCK_Q + BLOCK_Q, length) - 1 + offset
    low, high = key_range(spans, valid, first_position, last_position, num_keys, MAX_SPAN, RAMP, CAUSAL)
    # Rows beyond the last query have none: their block has no plateau
    narrowest = tl.min(spans)

    first = load_tile(query, rows, valid, columns, query_strides[2], query_strides[3], D).to(tl.float32)
    alpha, gains = head_number(mix, head, 0.5), head_number(gain, head, 1.0)
    size = tl.sqrt(tl.sum(first * first, 1) / D + TINY)[:, None] * gains
    asking = narrow(first, dtype)
    if NORMALIZED:
        first = first * inverse_size(first, D)
    factor = row_factor(sharp, scale, softcap)
    state = first
    attended = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    peak = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    running, steps = valid, tl.zeros([BLOCK_Q], tl.int32)
    step, going = 0, 1
    while going > 0:
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        summed = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        for start in range(low, high, BLOCK_K):
            k_tile = key_tile(key, start, high, columns, key_strides, D, BLOCK_K)
            v_tile = key_tile(value, start, high, value_columns, value_strides, DV, BLOCK_K)
            score, _, _ = tile_scores(
                asking, k_tile, start, high, rows, offset, first_position, last_position, spans, narrowest, factor,
                mask, mask_strides, bias, bias_strides, scale, softcap, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK,
                PRECISION,
            )  # fmt: skip
            peak, total, summed = attend(score, v_tile, peak, total, summed, PRECISION)
        previous = attended
        attended = summed / tl.where(total == 0, 1.0, total)[:, None]

        steps += running.to(tl.int32)
        change = tl.sum(tl.abs(attended - previous), 1) / DV
        if RELATIVE:
            change = change / tl.maximum(tl.sum(tl.abs(attended), 1) / DV, TINY)
        running = running & ~(change < base_threshold + threshold_scale * change)
        if readout is not None:
            places = readout + rows * readout_strides[2] + step * readout_strides[3]
            result += tl.load(places, mask=valid, other=0.0).to(tl.float32)[:, None] * attended
        step += 1
        going = (step < max_iterations).to(tl.int32) * tl.max(running.to(tl.int32))
        if going > 0:
            fed = fed_back(
                attended, matrix, rotation, rows, valid, columns, value_columns, matrix_strides, rotation_strides, D,
                DV, PRECISION,
            )  # fmt: skip
            updated = next_state(first if ANCHORED else state, fed, alpha, D, NORMALIZED)
            state = tl.where(running[:, None], updated, state)
            asked = updated * size if NORMALIZED else updated
            asking = tl.where(running[:, None], narrow(asked, dtype), asking)

    if readout is not None:
        # Iterations that nobody needed repeat the last output
        while step < max_iterations:
            places = readout + rows * readout_strides[2] + step * readout_strides[3]
            result += tl.load(places, mask=valid, other=0.0).to(tl.float32)[:, None] * attended
            step += 1
    else:
        result = attended
    store_tile(output, rows, valid, value_columns, output_strides[2], output_strides[3], DV, result)
    flat = (batch * heads + head) * length + rows
    tl.store(iterations + flat, steps.to(tl.int64), mask=valid)

    if entropy is not None:
        # −Σ p·log p with p = 2^(score − peak)/total: one more pass, at the price of no register within the loop
        zero = tl.where(peak == float("-inf"), 0.0, peak)[:, None]
        total = tl.where(total == 0, 1.0, total)[:, None]
        disorder = tl.zeros([BLOCK_Q], tl.float32)
        covered = tl.zeros([BLOCK_Q], tl.float32)
        seen = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(low, high, BLOCK_K):
            k_tile = key_tile(key, start, high, columns, key_strides, D, BLOCK_K)
            score, _, _ = tile_scores(
                asking, k_tile, start, high, rows, offset, first_position, last_position, spans, narrowest, factor,
                mask, mask_strides, bias, bias_strides, scale, softcap, MAX_SPAN, RAMP, CAUSAL, ADDITIVE_MASK,
                PRECISION,
            )  # fmt: skip
            share = tl.exp2(score - zero) / total
            disorder -= tl.sum(tl.where(share > 0, share * tl.log2(tl.where(share > 0, share, 1.0)), 0.0), 1)
            covered += tl.sum((share > coverage_threshold).to(tl.float32), 1)
            seen += tl.sum((score > float("-inf")).to(tl.float32), 1)
        tl.store(entropy + flat, disorder * LN_2, mask=valid)
        tl.store(coverage + flat, covered / tl.maximum(seen, 1.0), mask=valid)
