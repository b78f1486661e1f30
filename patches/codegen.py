"""CodeGen: `_attn` computes the scores, in float32."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("codegen", attention="CodeGenAttention", routed=True, causal=True),)
