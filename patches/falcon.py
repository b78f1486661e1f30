"""Falcon: `scaled_dot_product_attention` or a product of its own, by `config._attn_implementation`; ALiBi is in the
mask of the first and in the scores of the second."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("falcon", attention="FalconAttention", routed=True, causal=True, bias=True),)
