"""Attentions that the evidence compares with: scalable softmax, and Adaptive Span alone."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .iteration import log_weight, soft_span_mask
from .span import NEUTRAL_KEYS

PREFIX = "hf_focus_evidence_"
# Of Adaptive Span (1905.07799), in tokens
RAMP = 32
# That Adaptive Span takes at once
QUERIES = 64


def scaled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Full attention, logits times s·log n: n the keys that a query sees, s learned a head (2501.19399)."""
    seen = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device) + 1
    if not module.is_causal:
        seen = torch.full_like(seen, key.shape[2])
    scale = module.evidence_scale[:, None] * seen.to(query.dtype).log() / math.log(NEUTRAL_KEYS)
    return sdpa_attention_forward(module, query * scale[None, :, :, None], key, value, mask, **kwargs)


def spanned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention within a soft span that each head learns, the same for every token (Adaptive Span, 1905.07799).

    A block of queries is given the keys that the widest head can reach, and no others.
    """
    position = torch.arange(key.shape[2], device=query.device)
    span = module.evidence_span.clamp(0, 1)[:, None, None] * module.evidence_max_span
    reach = min(math.ceil(span.max().item()) + RAMP, module.evidence_max_span)
    before, outputs = key.shape[2] - query.shape[2], []
    for start in range(before, key.shape[2], QUERIES):
        stop = min(start + QUERIES, key.shape[2])
        keys = slice(max(0, start - reach), stop if module.is_causal else stop + reach)
        distance = position[start:stop, None] - position[keys]
        bias = log_weight(soft_span_mask(distance.abs(), span, RAMP, module.evidence_max_span))[None]
        if module.is_causal:
            bias = bias.masked_fill(distance < 0, float("-inf"))
        block = slice(start - before, stop - before)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, :, block, keys], float("-inf"))
        options = {**kwargs, "is_causal": False}
        outputs.append(
            sdpa_attention_forward(module, query[:, :, block], key[:, :, keys], value[:, :, keys], bias, **options)[0]
        )
    return torch.cat(outputs, dim=1), None


ATTENTIONS = {"scaled": scaled_attention, "spanned": spanned_attention}


def install(model: nn.Module, name: str, max_span: int) -> None:
    """Give every attention of a fresh `model` the attention `name`, with the parameters that it learns.

    Args:
        name: in `ATTENTIONS`.
        max_span: largest span of `"spanned"`, in tokens.
    """
    AttentionInterface.register(PREFIX + name, ATTENTIONS[name])
    AttentionMaskInterface.register(PREFIX + name, sdpa_mask)
    heads = model.config.num_attention_heads
    for module in model.modules():
        if hasattr(module, "is_causal") and hasattr(module, "scaling"):
            if name == "scaled":
                module.evidence_scale = nn.Parameter(torch.ones(heads))
            else:
                module.evidence_max_span = max_span
                module.evidence_span = nn.Parameter(torch.full((heads,), 0.5))
    model.set_attn_implementation(PREFIX + name)
