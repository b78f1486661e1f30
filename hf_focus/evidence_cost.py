"""What a model of the evidence costs: keys read, cache, and floating-point operations."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .branch import FocusBranch
from .evidence_attention import RAMP
from .recording import record_focus


@torch.no_grad()
def keys_read(model: nn.Module, **inputs: torch.Tensor) -> dict[str, float]:
    """Keys that the last query of a causal model reads, means over layers, heads and examples.

    A query reads the keys of the global branch, and those of the local one's span with its soft edge; what both read
    counts once. Keys further than both need not be kept.

    Returns:
        keys_read; keys_kept: the most that any layer must keep; keys_share: read, as a share of all.
    """
    length = inputs["input_ids"].shape[1]
    read, kept = [], 0.0
    branches = [module for module in model.modules() if isinstance(module, FocusBranch)]
    spans = [module for module in model.modules() if hasattr(module, "evidence_span")]
    if branches:
        with record_focus(model) as records:
            model(**inputs)
        for branch, layer in zip(branches, records, strict=True):
            config, call = branch.config, records[layer][0]
            reach = (call.span[..., -1] + config.ramp).clamp(max=min(config.max_span, length))
            near = float(length if config.max_dist is None else min(config.max_dist, length))
            sinks = min(config.sink_tokens, length - near) if config.max_dist is not None else 0
            read.append((reach.clamp(min=near) + sinks).clamp(max=length).mean().item())
            kept = max(kept, min(length, max(near, config.max_span) + sinks))
    elif spans:
        reach = [module.evidence_span.clamp(0, 1) * module.evidence_max_span + RAMP for module in spans]
        read = [layer.clamp(max=length).mean().item() for layer in reach]
        # A layer keeps what its furthest head reads
        kept = max(layer.clamp(max=length).max().item() for layer in reach)
    else:
        read, kept = [float(length)], float(length)
    mean = sum(read) / len(read)
    return {"keys_read": mean, "keys_kept": float(kept), "keys_share": mean / length}


@torch.no_grad()
def count_flops(model: nn.Module, **inputs: Any) -> float:
    """Floating-point operations of a forward pass, a token. Training takes about three times as many."""
    was_training = model.training
    model.eval()
    # Fused attention is not counted everywhere; its products are
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    model.train(was_training)
    return counter.get_total_flops() / inputs["input_ids"].numel()
