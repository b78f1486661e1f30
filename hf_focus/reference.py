"""Focus attention as its equations read: dense, T × S, in any floating dtype. What the fast paths must equal."""

import torch

from .iteration import FedBack, feed_back, has_converged, log_weight, soft_span_mask
from .problem import FocusOutput, FocusProblem


def focus_reference(problem: FocusProblem) -> FocusOutput:
    """Solve `problem` without any trick. Memory and time are O(T·S); use it to check, not to train.

    Float64 inputs are computed in float64; half precision is computed in float32 and cast back.
    """
    p = problem.in_compute_dtype()
    groups = p.num_heads // p.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (p.key, p.value))
    queries = torch.arange(p.query.shape[2], device=key.device)[:, None] + p.query_offset
    keys = torch.arange(key.shape[2], device=key.device)
    distance = queries - keys

    weight = soft_span_mask(distance.abs(), p.span[..., None], p.ramp, p.max_span)
    if p.is_causal:
        weight = weight.masked_fill(distance < 0, 0)
    bias = log_weight(weight)
    if p.attention_mask is not None:
        bias = bias + p.additive_mask(p.attention_mask)
    if p.position_bias is not None:
        bias = bias + p.position_bias
    bias = bias.expand(*p.query.shape[:3], keys.numel())

    state = FedBack(p.query, None)
    previous = p.query.new_zeros(*p.query.shape[:3], value.shape[-1])
    running = torch.ones(p.query.shape[:3], dtype=torch.bool, device=key.device)
    iterations = torch.zeros_like(running, dtype=torch.long)
    outputs, entropy, coverage = [], None, None
    for _ in range(p.max_iterations):
        scores = state.query @ key.transpose(-1, -2) * p.scaling
        if p.softcap is not None:
            scores = p.softcap * torch.tanh(scores / p.softcap)
        scores = scores * p.sharpness[..., None] + bias
        # A query that sees no key gets zeros, not the NaN of a softmax over nothing
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
        output = torch.where(running[..., None], weights @ value, previous)
        in_span = (bias > float("-inf")).sum(-1)
        new_coverage = (weights > p.coverage_threshold).to(weights.dtype).sum(-1) / in_span.clamp_min(1)
        new_entropy = torch.special.entr(weights).sum(-1)
        entropy = new_entropy if entropy is None else torch.where(running, new_entropy, entropy)
        coverage = new_coverage if coverage is None else torch.where(running, new_coverage, coverage)
        iterations = iterations + running
        outputs.append(output)
        change, size = (output - previous).abs().mean(dim=-1), output.abs().mean(dim=-1)
        stopped = has_converged(change, size, p.stop, p.base_threshold, p.threshold_scale)
        options = (p.feedback_matrix, p.mix, p.gain, p.feedback, p.anchored, p.rotation, p.rotary_pairs)
        state = feed_back(state, p.query, output, *options)
        previous = output
        running = running & ~stopped

    if p.readout_weights is None:
        result = outputs[-1]
    else:
        result = torch.einsum("ibhtv,bhti->bhtv", torch.stack(outputs), p.readout_weights)
    statistics = (entropy.detach(), coverage.detach()) if p.need_statistics else (None, None)
    return FocusOutput(result.to(problem.query.dtype), *statistics, iterations)
