"""The supported architectures: for each model type the classes of its self-attention.

Sizes, causality, windows and soft caps are read from the module and its config; a line says only what cannot be.
"""

from ..architecture import Architecture

# fmt: off
DECLARATIONS: tuple[Architecture, ...] = (
    # Decoders
    Architecture("gemma2", attention="Gemma2Attention"),
    Architecture("gemma3_text", attention="Gemma3Attention"),
    Architecture("gpt2", attention="GPT2Attention"),
    Architecture("gpt_neox", attention="GPTNeoXAttention"),
    Architecture("llama", attention="LlamaAttention"),
    Architecture("mistral", attention="MistralAttention"),
    Architecture("opt", attention="OPTAttention"),
    Architecture("phi3", attention="Phi3Attention"),
    Architecture("qwen2", attention="Qwen2Attention"),
    Architecture("qwen3", attention="Qwen3Attention"),
    # Encoders
    Architecture("bert", attention="BertSelfAttention"),
    Architecture("distilbert", attention="DistilBertSelfAttention"),
    Architecture("modernbert", attention="ModernBertAttention"),
    Architecture("roberta", attention="RobertaSelfAttention"),
    # Encoder-decoders
    Architecture("bart", attention="BartAttention"),
    Architecture("t5", attention="T5Attention"),
    # Vision and speech
    Architecture("vit", attention="ViTAttention"),
    Architecture("wav2vec2", attention="Wav2Vec2Attention"),
    Architecture("whisper", attention="WhisperAttention"),
)
# fmt: on
