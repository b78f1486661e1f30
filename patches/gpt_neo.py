"""GPT-Neo: unscaled scores; every other layer is local, by a mask inside the attention."""

from ..architecture import Architecture

ARCHITECTURES = (
    Architecture(
        "gpt_neo",
        attention="GPTNeoSelfAttention",
        routed=True,
        causal=True,
        scaling=1.0,
    ),
)
