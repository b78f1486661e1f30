"""MPT: ALiBi, and a scale that the config sets."""

from ..architecture import Architecture

ARCHITECTURES = (
    Architecture("mpt", attention="MptAttention", routed=True, causal=True, scaling="softmax_scale", bias=True),
)
