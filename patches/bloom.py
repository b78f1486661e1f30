"""BLOOM: the scores are `alibi.baddbmm(query, key)`, three-dimensional, with ALiBi in them."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("bloom", attention="BloomAttention", routed=True, causal=True, bias=True),)
