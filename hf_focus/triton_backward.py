"""The fused backward kernel: solves each block of queries again, then goes back through its iterations.

Per block: (A) all iterations forward, each one's query state, output and softmax normaliser into a scratch that the
program owns; (B) back through the iterations: gradients of outputs, queries and parameters; (C) gradients of keys and
values, each tile's summed over all iterations before it is added to memory. The scratch is as large as the programs
that run at once, whatever T is.
"""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("The fused kernels of hf_focus need `pip install triton`.") from missing

from .triton_gradients import (
    add_matrix_gradient,
    keep_tile,
    kept_tile,
    product_gradient,
    span_gradient,
)
from .triton_tiles import (
    TINY,
    attend,
    dot,
    fed_back,
    head_number,
    inverse_size,
    inverse_size_for_gradient,
    key_range,
    key_tile,
    load_tile,
    narrow,
    next_state,
    rotation_tile,
    row_factor,
    store_tile,
    tile_scores,
    unit_gradient,
)


# A cache that grows to a multiple of 16 is no reason for another kernel; strides that are one still are
@triton.jit(do_not_specialize=("length", "num_keys", "offset"))
def backward_kernel(
    query, key, value, span, sharpness, readout, matrix, mix, gain, rotation, mask, bias, iterations, grad,
    d_query, d_key, d_value, d_span, d_sharpness, d_readout, d_matrix, d_mix, d_gain, d_bias,
    scratch, operands,
    query_strides, key_strides, value_strides, span_strides, sharpness_strides, readout_strides, matrix_strides,
    rotation_strides, mask_strides, bias_strides, grad_strides, d_bias_strides,
    d_matrix_row, heads, groups, length, num_keys, offset, max_iterations, blocks, work,
    scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MAX_SPAN: tl.constexpr, RAMP: tl.constexpr, CAUSAL: tl.constexpr,
    NORMALIZED: tl.constexpr, ANCHORED: tl.constexpr, ADDITIVE_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs share `work` = blocks·batch·heads pieces.

    Gradients are float32 and contiguous, shaped as their inputs with heads and batch expanded; `d_key`, `d_value`,
    `d_matrix`, `d_mix`, `d_gain` and `d_bias` must start at zero, since many programs add into them. None: not
    wanted. `scratch`: for each program, max_iterations·BLOCK_Q·(BLOCK_D + BLOCK_DV + 2) float32; `operands`: the same
    without the 2, in the inputs' dtype.
    """
    local = tl.arange(0, BLOCK_Q)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dtype = key.dtype.element_ty
    piece = tl.program_id(0)
    states = scratch + piece.to(tl.int64) * max_iterations * BLOCK_Q * (BLOCK_D + BLOCK_DV + 2)
    outputs = states + max_iterations * BLOCK_Q * BLOCK_D
    normalizers = outputs + max_iterations * BLOCK_Q * BLOCK_DV
    deltas = normalizers + max_iterations * BLOCK_Q
    # Of each iteration, rounded as products take them: the query qᵗ, and the gradient of the output oᵗ
    asked = operands + piece.to(tl.int64) * max_iterations * BLOCK_Q * (BLOCK_D + BLOCK_DV)
    d_outputs = asked + max_iterations * BLOCK_Q * BLOCK_D

    while piece < work:
        block, row_of_heads = piece % blocks, piece // blocks
        batch, head = (row_of_heads // heads).to(tl.int64), (row_of_heads % heads).to(tl.int64)
        kv_head = head // groups
        rows = block * BLOCK_Q + local
        valid = rows < length
        q_base = query + batch * query_strides[0] + head * query_strides[1]
        k_base = key + batch * key_strides[0] + kv_head * key_strides[1]
        v_base = value + batch * value_strides[0] + kv_head * value_strides[1]
        g_base = grad + batch * grad_strides[0] + head * grad_strides[1]
        kv_row = (batch * (heads // groups) + kv_head) * num_keys
        flat = (batch * heads + head) * length + rows
        f_base, t_base, mask_base, bias_base = matrix, rotation, mask, bias
        if matrix is not None:
            f_base = matrix + head * matrix_strides[0]
        if rotation is not None:
            t_base = rotation + batch * rotation_strides[1]
        if mask is not None:
            mask_base = mask + batch * mask_strides[0] + head * mask_strides[1] + mask_strides[4]
        if bias is not None:
            bias_base = bias + batch * bias_strides[0] + head * bias_strides[1] + bias_strides[4]

        # Rows beyond the last query see nothing: for them no mask may be read
        spans = tl.load(
            span + batch * span_strides[0] + head * span_strides[1] + rows * span_strides[2],
            mask=valid,
            other=float("-inf"),
        ).to(tl.float32)
        sharp = tl.load(
            sharpness + batch * sharpness_strides[0] + head * sharpness_strides[1] + rows * sharpness_strides[2],
            mask=valid,
            other=0.0,
        ).to(tl.float32)
        first_position = block * BLOCK_Q + offset
        last_position = tl.minimum(block * BLOCK_Q + BLOCK_Q, length) - 1 + offset
        low, high = key_range(spans, valid, first_position, last_position, num_keys, MAX_SPAN, RAMP, CAUSAL)
        # Rows beyond the last query have none: their block has no plateau
        narrowest = tl.min(spans)
        factor = row_factor(sharp, scale, softcap)
        made = tl.load(iterations + flat, mask=valid, other=0).to(tl.int32)
        count = tl.max(made)

        query_tile = load_tile(q_base, rows, valid, columns, query_strides[2], query_strides[3], D).to(tl.float32)
        alpha, gains = head_number(mix, head, 0.5), head_number(gain, head, 1.0)
        size = tl.sqrt(tl.sum(query_tile * query_tile, 1) / D + TINY)
        inverse = inverse_size(query_tile, D)
        first = query_tile * inverse if NORMALIZED else query_tile
        grown = (size * gains)[:, None]

        # (A) forward again, with online softmax: the steps made are known, and nothing is decided
        tl.debug_barrier()
        state = first
        asking = narrow(query_tile, dtype)
        for step in range(0, count):
            peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            summed = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
            for start in range(low, high, BLOCK_K):
                k_tile = key_tile(k_base, start, high, columns, key_strides, D, BLOCK_K)
                v_tile = key_tile(v_base, start, high, value_columns, value_strides, DV, BLOCK_K)
                score, _, _ = tile_scores(
                    asking, k_tile, start, high, rows, offset, first_position, last_position, spans, narrowest, factor,
                    mask_base, mask_strides, bias_base, bias_strides, scale, softcap, MAX_SPAN, RAMP, CAUSAL,
                    ADDITIVE_MASK, PRECISION,
                )  # fmt: skip
                peak, total, summed = attend(score, v_tile, peak, total, summed, PRECISION)
            attended = summed / tl.where(total == 0, 1.0, total)[:, None]
            seen = total > 0
            normalizer = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), 0.0)
            keep_tile(asked, step, columns, asking, BLOCK_Q)
            if NORMALIZED:
                keep_tile(states, step, columns, state, BLOCK_Q)
            keep_tile(outputs, step, value_columns, attended, BLOCK_Q)
            tl.store(normalizers + step * BLOCK_Q + local, normalizer)
            if step + 1 < count:
                fed = fed_back(
                    attended, f_base, t_base, rows, valid, columns, value_columns, matrix_strides, rotation_strides, D,
                    DV, PRECISION,
                )  # fmt: skip
                updated = next_state(first if ANCHORED else state, fed, alpha, D, NORMALIZED)
                # A stopped query's further steps are never read, and must only stay finite
                state = tl.where((step + 1 < made)[:, None], updated, state)
                asking = narrow(state * grown if NORMALIZED else state, dtype)
        tl.debug_barrier()

        # The read-out: its own gradient, and how much of the gradient each iteration gets
        last = tl.maximum(made - 1, 0)
        last_share = tl.full([BLOCK_Q], 1.0, tl.float32)
        r_base = readout
        if readout is not None:
            r_base = readout + batch * readout_strides[0] + head * readout_strides[1] + rows * readout_strides[2]
            last_share = tl.zeros([BLOCK_Q], tl.float32)
            for step in range(0, max_iterations):
                share = tl.load(r_base + step * readout_strides[3], mask=valid, other=0.0).to(tl.float32)
                last_share += tl.where(step >= last, share, 0.0)
                if d_readout is not None:
                    d_result = load_tile(g_base, rows, valid, value_columns, grad_strides[2], grad_strides[3], DV)
                    # A stopped query repeats its last output
                    places = outputs + (tl.minimum(last, step) * BLOCK_Q + local)[:, None] * BLOCK_DV
                    repeated = tl.load(places + value_columns[None, :])
                    d_share = tl.sum(repeated * d_result, 1)
                    tl.store(d_readout + flat * max_iterations + step, d_share, mask=valid)

        # (B) back through the iterations
        d_asking = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        # Normalised: gradient of the direction dᵗ; additive: of qᵗ. Anchored: of what every step starts from
        carried = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        d_attended = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        d_size = tl.zeros([BLOCK_Q], tl.float32)
        d_gains = tl.zeros([BLOCK_Q], tl.float32)
        d_alpha = tl.zeros([BLOCK_Q], tl.float32)
        d_spans = tl.zeros([BLOCK_Q], tl.float32)
        d_factor = tl.zeros([BLOCK_Q], tl.float32)
        step = count - 1
        while step >= 0:
            attended = kept_tile(outputs, step, value_columns, BLOCK_Q)
            normalizer = tl.load(normalizers + step * BLOCK_Q + local)
            share = tl.where(step == last, last_share, 0.0)
            if readout is not None:
                given = tl.load(r_base + step * readout_strides[3], mask=valid, other=0.0).to(tl.float32)
                share = tl.where(step < last, given, share)
            d_result = load_tile(g_base, rows, valid, value_columns, grad_strides[2], grad_strides[3], DV)
            d_attended += share[:, None] * d_result
            delta = tl.sum(d_attended * attended, 1)
            d_narrow = narrow(d_attended, dtype)
            keep_tile(d_outputs, step, value_columns, d_narrow, BLOCK_Q)
            tl.store(deltas + step * BLOCK_Q + local, delta)
            asking = kept_tile(asked, step, columns, BLOCK_Q)
            d_asking = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for start in range(low, high, BLOCK_K):
                k_tile = key_tile(k_base, start, high, columns, key_strides, D, BLOCK_K)
                v_tile = key_tile(v_base, start, high, value_columns, value_strides, DV, BLOCK_K)
                score, capped, plateau = tile_scores(
                    asking, k_tile, start, high, rows, offset, first_position, last_position, spans, narrowest, factor,
                    mask_base, mask_strides, bias_base, bias_strides, scale, softcap, MAX_SPAN, RAMP, CAUSAL,
                    ADDITIVE_MASK, PRECISION,
                )  # fmt: skip
                weights = tl.exp2(score - normalizer[:, None])
                d_weights = dot(d_narrow, tl.trans(v_tile), None, PRECISION)
                d_score = weights * (d_weights - delta[:, None])
                d_factor += tl.sum(d_score * capped, 1)
                if not plateau:
                    d_spans += span_gradient(d_score, start, rows, offset, spans, RAMP, PRECISION)
                d_product = product_gradient(d_score, capped, sharp, scale, softcap)
                d_asking = dot(narrow(d_product, dtype), k_tile, d_asking, PRECISION)

            if step > 0:
                # Back through qᵗ = update(qᵗ⁻¹, oᵗ⁻¹·F)
                before = kept_tile(outputs, step - 1, value_columns, BLOCK_Q)
                if NORMALIZED:
                    fed = fed_back(
                        before, f_base, t_base, rows, valid, columns, value_columns, matrix_strides, rotation_strides,
                        D, DV, PRECISION,
                    )  # fmt: skip
                    state = kept_tile(states, step, columns, BLOCK_Q)
                    along = tl.sum(d_asking * state, 1)
                    d_size += along * gains
                    d_gains += along * size
                    # The first state is the direction of the query itself
                    base = kept_tile(states, 0 if ANCHORED else step - 1, columns, BLOCK_Q)
                    fed_inverse = inverse_size(fed, D)
                    direction = fed * fed_inverse
                    mixed = (1.0 - alpha) * base + alpha * direction
                    d_state = d_asking * grown
                    if not ANCHORED:
                        d_state += carried
                    d_mixed = unit_gradient(d_state, state, inverse_size_for_gradient(mixed, D), D)
                    d_alpha += tl.sum(d_mixed * (direction - base), 1)
                    d_fed = unit_gradient(alpha * d_mixed, direction, inverse_size_for_gradient(fed, D), D)
                    d_base = (1.0 - alpha) * d_mixed
                else:
                    d_base = d_asking
                    if not ANCHORED:
                        d_base += carried
                    d_fed = d_base
                carried = carried + d_base if ANCHORED else d_base
                if matrix is not None:
                    f_tile = load_tile(
                        f_base, value_columns, value_columns < DV, columns, matrix_strides[1], matrix_strides[2], D
                    )
                    d_turned = d_fed
                    if rotation is not None:
                        d_fed = d_fed * rotation_tile(t_base, 0, rows, valid, columns, rotation_strides, D)
                    d_fed = narrow(d_fed, dtype)
                    d_attended = dot(d_fed, tl.trans(f_tile), None, PRECISION)
                    places = d_matrix
                    if d_matrix is not None:
                        places = d_matrix + head * DV * d_matrix_row
                        add_matrix_gradient(
                            places, before, d_fed, columns, value_columns, d_matrix_row, D, DV, PRECISION
                        )
                    if rotation is not None:
                        d_turned = d_turned * rotation_tile(t_base, 1, rows, valid, columns, rotation_strides, D)
                        d_turned = narrow(d_turned, dtype)
                        f_tile = load_tile(
                            f_base + D * matrix_strides[2], value_columns, value_columns < DV, columns,
                            matrix_strides[1], matrix_strides[2], D,
                        )  # fmt: skip
                        d_attended = dot(d_turned, tl.trans(f_tile), d_attended, PRECISION)
                        if d_matrix is not None:
                            add_matrix_gradient(
                                places + D, before, d_turned, columns, value_columns, d_matrix_row, D, DV, PRECISION
                            )
                else:
                    d_attended = tl.where((columns < D)[None, :], d_fed, 0.0)
            step -= 1

        if d_query is not None:
            if NORMALIZED:
                itself = load_tile(q_base, rows, valid, columns, query_strides[2], query_strides[3], D).to(tl.float32)
                direction = kept_tile(states, 0, columns, BLOCK_Q)
                d_asking += unit_gradient(carried, direction, inverse_size_for_gradient(itself, D), D)
                d_asking += itself * (d_size / (D * size))[:, None]
            else:
                d_asking += carried
            store_tile(d_query + (batch * heads + head) * length * D, rows, valid, columns, D, 1, D, d_asking)
        if d_span is not None:
            tl.store(d_span + flat, d_spans, mask=valid)
        if d_sharpness is not None:
            tl.store(d_sharpness + flat, row_factor(d_factor, scale, softcap), mask=valid)
        if d_mix is not None:
            tl.atomic_add(d_mix + head, tl.sum(d_alpha), sem="relaxed")
        if d_gain is not None:
            tl.atomic_add(d_gain + head, tl.sum(d_gains), sem="relaxed")
        tl.debug_barrier()

        # (C) keys and values: a tile's gradient is added up over the iterations, then added to memory once
        if d_key is not None or d_value is not None or d_bias is not None:
            for start in range(low, high, BLOCK_K):
                keys = start + tl.arange(0, BLOCK_K)
                at, exists = keys[None, :], keys < high
                k_tile = key_tile(k_base, start, high, columns, key_strides, D, BLOCK_K)
                v_tile = key_tile(v_base, start, high, value_columns, value_strides, DV, BLOCK_K)
                d_k_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
                d_v_tile = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
                d_bias_tile = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                for step in range(0, count):
                    asking = kept_tile(asked, step, columns, BLOCK_Q)
                    d_narrow = kept_tile(d_outputs, step, value_columns, BLOCK_Q)
                    normalizer = tl.load(normalizers + step * BLOCK_Q + local)
                    delta = tl.load(deltas + step * BLOCK_Q + local)
                    score, capped, _ = tile_scores(
                        asking, k_tile, start, high, rows, offset, first_position, last_position, spans, narrowest,
                        factor, mask_base, mask_strides, bias_base, bias_strides, scale, softcap, MAX_SPAN, RAMP,
                        CAUSAL, ADDITIVE_MASK, PRECISION,
                    )  # fmt: skip
                    weights = tl.exp2(score - normalizer[:, None])
                    d_weights = dot(d_narrow, tl.trans(v_tile), None, PRECISION)
                    d_score = weights * (d_weights - delta[:, None])
                    if d_bias is not None:
                        d_bias_tile += d_score
                    d_product = narrow(product_gradient(d_score, capped, sharp, scale, softcap), dtype)
                    d_k_tile = dot(tl.trans(d_product), asking, d_k_tile, PRECISION)
                    d_v_tile = dot(tl.trans(narrow(weights, dtype)), d_narrow, d_v_tile, PRECISION)
                if d_key is not None:
                    places = (kv_row + keys)[:, None] * D + columns[None, :]
                    tl.atomic_add(
                        d_key + places, d_k_tile, mask=exists[:, None] & (columns < D)[None, :], sem="relaxed"
                    )
                if d_value is not None:
                    places = (kv_row + keys)[:, None] * DV + value_columns[None, :]
                    tl.atomic_add(
                        d_value + places, d_v_tile, mask=exists[:, None] & (value_columns < DV)[None, :], sem="relaxed"
                    )
                if d_bias is not None:
                    places = batch * d_bias_strides[0] + head * d_bias_strides[1]
                    places += rows.to(tl.int64)[:, None] * d_bias_strides[2] + at.to(tl.int64) * d_bias_strides[3]
                    tl.atomic_add(d_bias + places, d_bias_tile, mask=valid[:, None] & exists[None, :], sem="relaxed")
        piece += tl.num_programs(0)
