"""Tiny models with random weights of every supported architecture, and inputs for them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, StaticCache

from hf_focus import FocusConfig, apply_focus

VOCAB = 99
PAD = 0
# Small enough that a sequence of LENGTH tokens is several spans long
# The refiner too, which is off by default
SETTINGS = FocusConfig(max_span=7, ramp=3, max_iterations=3, refiner=True)
LENGTH = 20


@dataclass(frozen=True)
class Tiny:
    """One architecture: how to build it, and what it eats (`text`, `seq2seq`, `image`, `audio`, `speech`)."""

    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)
    eats: str = "text"
    is_decoder: bool = False

    def build_config(self, **changes: Any) -> Any:
        return getattr(transformers, self.config)(**{**self.sizes, **changes})

    def build(self, model: str | None = None, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        return getattr(transformers, model or self.model)(self.build_config(**changes)).eval()


_BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "pad_token_id": PAD}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_BASE, **_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_BERT = {**_BASE, "intermediate_size": 48}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "decoder_start_token_id": 2,
    **_TOKENS,
}

TINY: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", _GROUPED, is_decoder=True),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 6}, is_decoder=True),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", _GROUPED, is_decoder=True),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, is_decoder=True),
    "gemma2": Tiny("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, **_WINDOWS, "head_dim": 16}, is_decoder=True),
    "gemma3_text": Tiny(
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, **_WINDOWS, "head_dim": 16}, is_decoder=True
    ),
    "phi3": Tiny("Phi3Config", "Phi3ForCausalLM", _GROUPED, is_decoder=True),
    "gpt2": Tiny("GPT2Config", "GPT2LMHeadModel", {**_BASE, **_TOKENS}, is_decoder=True),
    "gpt_neox": Tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_BERT, **_TOKENS}, is_decoder=True),
    "opt": Tiny(
        "OPTConfig", "OPTForCausalLM", {**_BASE, **_TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32}, is_decoder=True
    ),
    "bert": Tiny("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": Tiny("RobertaConfig", "RobertaForMaskedLM", {**_BERT, **_TOKENS}),
    "distilbert": Tiny(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB, "pad_token_id": PAD},
    ),
    "modernbert": Tiny(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_BERT, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6},
    ),
    "vit": Tiny(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
        eats="image",
    ),
    "wav2vec2": Tiny(
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {
            **_BERT,
            "conv_dim": (16, 16),
            "conv_kernel": (10, 4),
            "conv_stride": (5, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "layerdrop": 0.0,
            "apply_spec_augment": False,
        },
        eats="audio",
    ),
    "whisper": Tiny(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 24,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        eats="speech",
        is_decoder=True,
    ),
    "t5": Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "decoder_start_token_id": 0,
            "eos_token_id": 2,
        },
        eats="seq2seq",
        is_decoder=True,
    ),
    "bart": Tiny("BartConfig", "BartForConditionalGeneration", _BART, eats="seq2seq", is_decoder=True),
}
DECODERS = [name for name, tiny in TINY.items() if tiny.is_decoder]
CAUSAL_LMS = [name for name, tiny in TINY.items() if tiny.is_decoder and tiny.eats == "text"]
ENCODERS = [name for name, tiny in TINY.items() if not tiny.is_decoder and tiny.eats == "text"]


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length), no special ones among them."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_inputs(name: str, batch: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """What the architecture's forward needs for logits."""
    noise = torch.Generator().manual_seed(1)
    eats = TINY[name].eats
    if eats == "image":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=noise)}
    if eats == "audio":
        return {"input_values": torch.randn(batch, 20 * length + 40, generator=noise)}
    if eats == "speech":
        features = torch.randn(batch, 8, 48, generator=noise)
        return {"input_features": features, "decoder_input_ids": tokens(batch, length)}
    if eats == "seq2seq":
        return {"input_ids": tokens(batch, length, seed=2), "decoder_input_ids": tokens(batch, length)}
    return {"input_ids": tokens(batch, length)}


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every weight of FocusA a random value, as training would: the branch is no longer silent."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".focus." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for name, buffer in model.named_buffers():
        if name.endswith(".refiner.table"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def patched(name: str, settings: FocusConfig = SETTINGS, **changes: Any) -> PreTrainedModel:
    """A tiny model with a branch that acts, in eval mode."""
    return randomize(apply_focus(TINY[name].build(**changes), settings))


def logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def decoded(model: PreTrainedModel, ids: torch.Tensor, cache: str) -> torch.Tensor:
    """Logits of `ids` (B, LENGTH), given several at once, then one by one, with a `"dynamic"` or `"static"` cache."""
    past = StaticCache(config=model.config, max_cache_len=LENGTH + 3) if cache == "static" else None
    steps = []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 9), *((place, place + 1) for place in range(9, LENGTH))):
            step = model(ids[:, start:end], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    return torch.cat(steps, dim=1)


def left_padded(ids: torch.Tensor, padding: int = 6) -> dict[str, torch.Tensor]:
    """`ids` with padding before them, and their mask."""
    empty = torch.full((len(ids), padding), PAD)
    mask = torch.cat([torch.zeros_like(empty), torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([empty, ids], dim=1), "attention_mask": mask}


def in_one_row(ids: torch.Tensor) -> dict[str, Any]:
    """The rows of `ids` (B, T) as documents of one row, told apart by their positions."""
    positions = torch.arange(ids.shape[1]).repeat(len(ids))
    return {"input_ids": ids.reshape(1, -1), "position_ids": positions[None], "use_cache": False}
