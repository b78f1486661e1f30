"""DeBERTa v2 and v3: keys are scaled before the product; content-to-position and position-to-content scores are added
to it, and stay those of the first query while focus repeats."""

from ..architecture import Architecture

ARCHITECTURES = (
    Architecture("deberta-v2", attention="DisentangledSelfAttention", routed=True, scaling=1.0, bias=True),
)
