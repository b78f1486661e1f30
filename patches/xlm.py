"""XLM and FlauBERT: queries are scaled before the product; causal if the config says so."""

from ..architecture import Architecture

ARCHITECTURES = (
    Architecture(
        "xlm", attention="MultiHeadAttention", exclude=r"encoder_attn", routed=True, scaling=1.0, causal="causal"
    ),
    Architecture(
        "flaubert",
        attention="MultiHeadAttention",
        exclude=r"encoder_attn",
        routed=True,
        scaling=1.0,
        causal="causal",
    ),
)
