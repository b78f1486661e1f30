"""Adapters on tiny models, and what of a model tests compare."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import SETTINGS, TINY, randomize
from torch import nn

from hf_focus import FocusAdapterConfig, FocusConfig, FocusLoraConfig
from hf_focus.adapter_layer import FocusAdapterLayer

ARCHITECTURES = ["llama", "gemma2", "gpt2", "bert", "t5", "whisper"]
ADAPTER = "adapter_model.safetensors"


def settings(**changes: Any) -> FocusConfig:
    return FocusConfig.build(SETTINGS, **changes)


def config(**changes: Any) -> FocusAdapterConfig:
    return FocusAdapterConfig(focus_config=settings(**changes))


def lora_config(**changes: Any) -> FocusLoraConfig:
    return FocusLoraConfig(**{"r": 2, "target_modules": ["q_proj"], "focus_config": SETTINGS, **changes})


def adapted(name: str, adapter: PeftConfig | None = None) -> PeftModel:
    """A tiny model with an adapter that acts, in eval mode."""
    return randomize(get_peft_model(TINY[name].build(), adapter or config())).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".focus." not in key}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, FocusAdapterLayer)


def layers_of(model: nn.Module) -> list[FocusAdapterLayer]:
    return list(filter(is_layer, model.modules()))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that an adapter might leave a trace on."""
    return {
        path: (type(module), set(vars(module)), set(dict(module.named_children())), vars(module).get("config"))
        for path, module in model.named_modules()
    } | {
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "config": (model.config.to_dict(), model.config._attn_implementation) if hasattr(model, "config") else None,
    }
