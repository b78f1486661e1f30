"""RemBERT: as BERT before the interface; a decoder if the config says so."""

from ..architecture import Architecture

ARCHITECTURES = (Architecture("rembert", attention="RemBertSelfAttention", routed=True, causal="is_decoder"),)
