"""RoFormer: rotary positions, by default also on the values; a decoder if the config says so."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("roformer", attention="RoFormerSelfAttention", routed=True, causal="is_decoder"),)
