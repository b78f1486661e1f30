"""A tiny model of any model type that transformers has, with random weights, and inputs that it takes."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, LENGTH, BATCH, IMAGE = 99, 20, 2, 32

# The most telling task of a model type goes first
TASKS = (
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MODEL_FOR_CTC",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_AUDIO_CLASSIFICATION",
    "MODEL_FOR_VIDEO_CLASSIFICATION",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "MODEL",
)

# Sizes by the name of the setting: the first pattern that fits the whole name decides
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab(ulary)?_size|n_vocab|vocab_size_or.*|n_words|num_tokens", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|max_sequence_length", 64),
    (r"(num_)?(encoder|decoder|hidden|text|vision|speech|attention|audio|transformer|prediction)_layers", 2),
    (r"num_(hidden_layers|layers|blocks)|n_layers?|num_(encoder|decoder)_(hidden_)?layers|depth|layers", 2),
    (r"num_hidden_layers_.*", 2),
    (r"num_(key_value|kv)_heads|n_kv_heads?|num_query_groups|multi_query_group_num", 2),
    (r"(num_)?(.*_)?attention_heads|n_heads?|num_heads|num_.*_heads|.*_num_heads|heads|.*_heads", 4),
    (r"qk_(nope|rope)_head_dim|.*head_dim|d_kv|d_head|attention_head_size|key_value_proj_dim|head_size", 16),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"num_experts_per_tok|moe_top_?k|top_?k|moe_k|num_experts_per_token|num_selected_experts|expert_num_per_tok", 2),
    (r"n_group|topk_group|num_expert_group|moe_num_shared_experts|n_shared_experts|num_shared_experts", 1),
    (r"(n_|num_|moe_num_)?(routed_|local_)?experts|num_experts.*|moe_num_experts", 4),
    (r".*(intermediate|ffn|inner|feed_?forward|mlp|ff)_?(size|dim|inner)?|ffn_hidden_size|filter_size", 48),
    (r".*(hidden_size|embed_dim|d_model|emb_dim|embd_pdim)|n_embd|dim|hidden_dim|model_dim|width", 64),
    (r"embedding_(size|dim)|.*_hidden_(size|dim)|.*_embed(ding)?_(size|dim)|.*projection_(size|dim)", 64),
    (r".*image_size|img_size|crop_size", IMAGE),
    (r".*patch_size|patch_stride", 8),
    (r"num_mel_bins|num_mels|feature_size|n_mels", 16),
    (r"sliding_window|local_attention|attention_window|.*_window_size|window_size|attention_chunk_size|chunk_size", 6),
    (r"num_frames|frames_per_clip", 2),
    (r"num_labels", 3),
    (r"num_queries|num_query_tokens|num_latents|num_learnable_queries|query_num", 5),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_d_ssm|d_state|conv_dim_state", 16),
    (r"(mamba_)?n_groups|(mamba_|ssm_)?num_groups", 1),
    (r"num_codebooks|n_codes_.*", 2),
)  # fmt: skip
# Rotary positions of images take their sections from a default for large heads
_MROPE = re.compile(
    r"(qwen2(_5)?_(vl|omni)|glm4v|glm4v_moe|glm_ocr|glm_image|paddleocr_vl|keye|hunyuan_vl).*text|qwen2_5_omni_talker"
)
_NEVER = re.compile(
    r"(qk_head_dim|layer_types|rope_parameters|id2label|label2id|num_labels|initializer_.*|.*_token_id|.*_ratio)$"
)
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_NO_NOISE = re.compile(r".*(dropout|drop_rate|layerdrop|drop_path).*|.*_pdrop|dropout|attn_pdrop")


def model_class_of(model_type: str) -> tuple[str, type[PreTrainedModel]] | None:
    """The mapping and class of the most telling task that a model type has; None: no Auto class has it."""
    mappings = {
        name.removesuffix("_MAPPING_NAMES"): getattr(modeling_auto, name.removesuffix("_NAMES"), None)
        for name, types in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES") and model_type in types
    }
    config_class = CONFIG_MAPPING[model_type]
    for name in sorted(mappings, key=lambda name: (TASKS.index(name) if name in TASKS else len(TASKS) - 1, name)):
        if mappings[name] is not None and config_class in mappings[name]:
            found = mappings[name][config_class]
            found = found[0] if isinstance(found, tuple) else found
            if found.config_class is config_class or issubclass(config_class, found.config_class or ()):
                return name, found
    return None


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A config of a class with every size small, and no dropout.

    Args:
        overrides: settings; a dict for a config within it is merged with what would be made for that.
    """
    return config_class(**_tiny_settings(config_class, overrides or {}))


def _tiny_settings(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    default = config_class()
    settings: dict[str, Any] = {}
    special = 80
    for name, value in vars(default).items():
        described = getattr(config_class, name, None)
        if isinstance(described, property) and described.fset is None:
            continue
        sub = config_class.sub_configs.get(name)
        if isinstance(value, PreTrainedConfig):
            kind = type(value) if sub is None or not hasattr(sub, "model_type") or not sub.model_type else sub
            settings[name] = {**_tiny_settings(kind, overrides.get(name, {})), "model_type": kind.model_type}
            settings[name] = kind(**{k: v for k, v in settings[name].items() if k != "model_type"})
        elif name in _SPECIAL_TOKENS and value is not None:
            settings[name] = _SPECIAL_TOKENS[name]
        elif re.search(r"_token_(id|index)$", name) and isinstance(value, int):
            settings[name] = special = special + 1
        elif isinstance(value, float) and _NO_NOISE.fullmatch(name):
            settings[name] = 0.0
        elif (smaller := _smaller(name, value)) is not None:
            settings[name] = smaller
    settings.update(_layer_types(default, settings))
    # Settings as they stand: some configs refuse to be asked for what their layers do not share
    held = vars(default)
    heads, kv_heads = (held.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads is not None and heads == kv_heads and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    rope = held.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        settings["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    if _MROPE.fullmatch(config_class.model_type) and hasattr(default, "rope_parameters"):
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if held.get("num_experts_per_tok", 0) is None:
        settings["num_experts_per_tok"] = 2
    if held.get("head_dim", 0) is None:
        settings["head_dim"] = 16
    if getattr(default, "num_key_value_heads", 0) is None and not isinstance(
        default.num_attention_heads, (list, tuple)
    ):
        settings["num_key_value_heads"] = settings.get("num_attention_heads", heads)
    plain = {name: value for name, value in overrides.items() if not isinstance(settings.get(name), PreTrainedConfig)}
    settings.update(plain)
    # Derived settings are made anew where None is given
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _smaller(name: str, value: Any) -> Any:
    if _NEVER.match(name) or isinstance(value, bool):
        return None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    if size is None:
        return None
    if isinstance(value, int) and value > 0:
        return min(size, value) if value < size and "vocab" not in name else size
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return type(value)(min(size, item) for item in value)
    return None


def _layer_types(default: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind at least."""
    kinds = getattr(default, "layer_types", None)
    name = default.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(type(default), name, None), property):
        return {}
    if not isinstance(kinds, (list, tuple)) or not kinds or "num_hidden_layers" not in settings:
        return {}
    different = list(dict.fromkeys(kinds))
    different = different if len(different) > 1 else different * 2
    return {"layer_types": different, "num_hidden_layers": len(different)}


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids (batch, length), no special ones among them."""
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these settings that a config or one within it has."""
    configs = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    for item in configs:
        for name in names:
            value = getattr(item, name, None)
            if value is not None:
                return value
    return None


def _images(config: PreTrainedConfig) -> Iterator[Tensor]:
    size = _first(config, "image_size", "img_size", "input_size", "crop_size")
    height, width = size if isinstance(size, (list, tuple)) else (size or IMAGE, size or IMAGE)
    channels = _first(config, "num_channels", "in_channels", "in_chans", "channels")
    channels = channels if isinstance(channels, int) else 3
    frames = _first(config, "num_frames", "frames_per_clip") or 2
    noise = torch.Generator().manual_seed(1)
    yield torch.randn(BATCH, channels, height, width, generator=noise)
    yield torch.randn(BATCH, frames, channels, height, width, generator=noise)
    yield torch.randn(BATCH, channels, 64, 64, generator=noise)
    yield torch.randn(BATCH, channels, 224, 224, generator=noise)


def _sounds(config: PreTrainedConfig) -> Iterator[Tensor]:
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "num_mels", "n_mels") or 16
    frames = _first(config, "max_source_positions", "max_length", "spectrogram_length") or 32
    noise = torch.Generator().manual_seed(1)
    yield torch.randn(BATCH, mels, 2 * frames, generator=noise)
    yield torch.randn(BATCH, frames, mels, generator=noise)
    yield torch.randn(BATCH, 64, mels, generator=noise)
    yield torch.randn(BATCH, 4000, generator=noise)
    yield torch.randn(BATCH, 1, 4000, generator=noise)
    yield torch.randn(BATCH, 1, frames, mels, generator=noise)
    yield torch.randn(BATCH, 1, 64, 64, generator=noise)


def _others(takes: Any, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Inputs that go with the patches of an image, or with a time series."""
    noise, found = torch.Generator().manual_seed(1), {}
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in takes), None)
    patch = _first(config, "patch_size") or 8
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    channels = _first(config, "in_channels", "num_channels", "in_chans") or 3
    if grid is not None:
        frames = _first(config, "temporal_patch_size") or 1
        name = "hidden_states" if "hidden_states" in takes else "pixel_values"
        found[name] = torch.randn(32, channels * frames * patch**2, generator=noise)
        found[grid] = torch.tensor([[1, 4, 4], [1, 4, 4]])
    if "spatial_shapes" in takes:
        found["pixel_values"] = torch.randn(BATCH, 16, channels * patch**2, generator=noise)
        found["pixel_attention_mask"] = torch.ones(BATCH, 16, dtype=torch.int64)
        found["spatial_shapes"] = torch.tensor([[4, 4], [4, 4]])
    if "pixel_position_ids" in takes or "image_position_ids" in takes:
        name = "pixel_position_ids" if "pixel_position_ids" in takes else "image_position_ids"
        found["pixel_values"] = torch.rand(BATCH, 16, channels * patch**2, generator=noise)
        found[name] = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], dim=-1)[None].repeat(BATCH, 1, 1)
    if "past_values" in takes:
        length = _first(config, "context_length") or 32
        variables = _first(config, "num_input_channels", "input_size") or 1
        shape = (BATCH, length, variables) if hasattr(config, "num_input_channels") else (BATCH, length)
        found["past_values"] = torch.randn(shape, generator=noise)
    return found


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inputs that a model's forward may take, the likeliest first: its signature tells their names, not their form."""
    takes = inspect.signature(model.forward).parameters
    text: dict[str, Tensor] = {}
    if "input_ids" in takes:
        text["input_ids"] = tokens(seed=2 if "decoder_input_ids" in takes else 0)
    if "bbox" in takes:
        text["bbox"] = (
            torch.randint(0, 9, (BATCH, LENGTH, 4), generator=torch.Generator().manual_seed(4)).sort().values
        )
    decoder = {"decoder_input_ids": tokens()} if "decoder_input_ids" in takes else {}
    others = _others(takes, model.config)
    image_names = [name for name in ("pixel_values", "pixel_values_videos", "flattened_patches") if name in takes]
    sound_names = [name for name in ("input_features", "input_values", "audio_values", "features") if name in takes]
    images = [{image_names[0]: image} for image in _images(model.config)] if image_names else [{}]
    sounds = [{sound_names[0]: sound} for sound in _sounds(model.config)] if sound_names else [{}]
    if text and image_names:
        for image in images:
            yield {**text, **decoder, **image}
    if others:
        yield {**text, **others} if "spatial_shapes" in others else others
    if text:
        yield {**text, **decoder}
        if decoder:
            yield text
        yield {**text, "token_type_ids": torch.zeros_like(text["input_ids"])}
    for image in images:
        for sound in sounds:
            if image or sound:
                yield {**image, **sound, **decoder}
                yield {**image, **sound}
            if sound and "input_features_mask" in takes:
                frames = next(iter(sound.values())).shape
                for length in frames[1:]:
                    yield {**text, **sound, "input_features_mask": torch.ones(BATCH, length, dtype=torch.int64)}
            if sound and "attention_mask" in takes:
                for length in next(iter(sound.values())).shape[1:]:
                    yield {**sound, "attention_mask": torch.ones(BATCH, length, dtype=torch.int64)}
    for sound in sounds:
        if text and sound:
            yield {**text, **decoder, **sound}


def find_inputs(model: PreTrainedModel, better: Callable[[dict[str, Tensor]], int]) -> dict[str, Tensor]:
    """Of the inputs that a model runs on, those that `better` rates highest; the first that gets the best possible.

    Raises:
        RuntimeError: it runs on none of those tried; the message is what the first said.
    """
    best, top, said = None, -1, None
    for inputs in candidates(model):
        try:
            rate = better(inputs)
        except Exception as error:
            said = said or f"{type(error).__name__}: {error}"
            continue
        if rate > top:
            best, top = inputs, rate
        if rate >= 100:
            break
    if best is None:
        raise RuntimeError(f"no inputs known that it runs on ({said})")
    return best
