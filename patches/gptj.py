"""GPT-J: `_attn` computes the scores, in float32."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("gptj", attention="GPTJAttention", routed=True, causal=True),)
