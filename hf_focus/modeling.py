"""Model classes of patched architectures: `FocusLlamaForCausalLM(LlamaForCausalLM)`, made on demand for any class."""

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from os import PathLike
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .architecture import Architecture, find_architecture
from .auto_classes import PREPROCESSORS, auto_models, name_tokenizer
from .branch import FocusBranch
from .configuration import FocusConfig
from .discovery import architecture_of
from .errors import FocusCheckpointError, FocusConfigError, bad_value
from .focus_cache import FocusCache
from .focus_configs import MODEL_TYPE_PREFIX, focus_config_class, is_focus, repoint, to_focus, with_plain_parts
from .interface import focus_name, global_name, register_interface
from .model_masks import as_tensor
from .peft_targets import name_targets
from .penalty import with_span_penalty
from .refiner import Refiner
from .routing import change_class
from .sites import Site, build_branches, install, plan, with_rotary
from .span import AdaptiveSpan, Predictor

# Loaded as remote code, nothing but this module is imported
register_interface()


class FocusMixin:
    """What FocusA adds to a model class: it builds the branches, initialises, loads and saves them."""

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        if not is_focus(config):
            config = to_focus(config, FocusConfig(), None)
        config = with_plain_parts(config)
        # Some heads make their inner model through AutoModel
        register_models(type(config))
        super().__init__(config, *inputs, **kwargs)
        focus_config, architecture = read_patch(config)
        architecture = architecture_of(self) if architecture is None else architecture
        sites = plan(self, focus_config, architecture)
        architecture = with_rotary(architecture, sites, focus_config)
        config.focus_architecture = architecture.to_dict()
        adoption = plan_adoption(self, sites, focus_config, architecture)
        empty = [site for site in sites if not hasattr(site.module, "focus")]
        install(empty, build_branches(empty, focus_config, torch.get_default_dtype()))
        adopt(self, adoption)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made on demand: what pickles is how to make it
        return _unpickled, (self.base_class,), self.__dict__

    @property
    def focus_config(self) -> FocusConfig:
        """The settings this model was patched with."""
        return FocusConfig.from_dict(self.config.focus_config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FocusBranch, Predictor, AdaptiveSpan, Refiner)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source of the class's module, and that is this file
        return cls.base_class._can_set_attn_implementation()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Whatever attention is asked for becomes the global branch's."""
        wanted = global_name(attn_implementation)
        if wanted is None:
            wanted = read_patch(self.config)[0].global_attn_implementation
        chosen = super()._check_and_adjust_attn_implementation(wanted, *args, **kwargs)
        return chosen if _is_routed(self.config) else focus_name(chosen)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As transformers', for the global branch."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for module in self.modules():
            # transformers does not ask inner models, only the outermost
            if isinstance(module, FocusMixin) and not _is_routed(module.config):
                module.config._attn_implementation_internal = focus_name(module.config._attn_implementation)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers'; the cache that `generate` makes by default is a bounded one under `max_dist`."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # By the exact type: not one that the user gave or asked for
        if given is not None or type(model_kwargs.get("past_key_values")) is not DynamicCache:
            return
        mask = model_kwargs.get("attention_mask")
        if not has_bounded_cache(self) or (mask is not None and mask.ndim != 2):
            return
        offloading = generation_config.cache_implementation == "offloaded"
        cache = FocusCache(self.config, mask, offloading=offloading, all_patched=True)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """As transformers', which leaves a Whisper's prompt as it is, told by its model type."""
        if type(self.config).base_class.model_type == "whisper" and "decoder_input_ids" in model_kwargs:
            return model_kwargs.pop("decoder_input_ids"), model_kwargs
        return super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Masks made ahead for compiled decoding, as transformers': a compiled graph takes tensors only."""
        make = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        masks = make(**kwargs)
        if isinstance(masks, dict):
            return {kind: as_tensor(mask) for kind, mask in masks.items()}
        return as_tensor(masks)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; a plain checkpoint of the base architecture loads too.

        Args:
            focus_config: `FocusConfig` to use for a plain checkpoint.

        Raises:
            FocusCheckpointError: the checkpoint holds FocusA weights that do not fit its config.json.
        """
        want_info = kwargs.pop("output_loading_info", False)
        ignore = kwargs.pop("ignore_mismatched_sizes", False)
        # Shapes are checked here, where it is known whose they are
        try:
            model, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            accepted = f"whole safetensors files ({error})"
            raise FocusCheckpointError(bad_value("weights", str(args[0]), accepted)) from error
        _check_loaded(model, info)
        if info["mismatched_keys"] and not ignore:
            names = ", ".join(sorted(entry[0] for entry in info["mismatched_keys"]))
            raise RuntimeError(f"Weights of other shapes than the model's, see ignore_mismatched_sizes: {names}")
        return (model, info) if want_info else model

    def save_pretrained(
        self, save_directory: str | PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers'. The folder also gets the code that reads it, for `trust_remote_code=True`.

        With `push_to_hub` the whole folder is pushed, as `hf_focus.push_folder` does, whose arguments are taken too.
        """
        here = __name__.rpartition(".")[2]
        self.config.auto_map = {
            auto_class.__name__: f"{here}.Focus{models[0].__name__}"
            for auto_class, models in auto_models(type(self.config).base_class)
        }
        sharing = _sharing()
        if sharing is None:
            super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
            return
        push = sharing.take_push_arguments(save_directory, kwargs) if push_to_hub else None
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            sharing.drop_stale_weights(save_directory)
            if push is not None:
                sharing.push_folder(save_directory, **push)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As transformers', as one commit that is checked and leaves no older weights: see `hf_focus.push_folder`."""
        sharing = _sharing()
        return (
            super().push_to_hub(repo_id, **kwargs) if sharing is None else sharing.push_model(self, repo_id, **kwargs)
        )


def has_bounded_cache(model: PreTrainedModel) -> bool:
    """Whether no layer of a decoder looks further than `max_dist`, and each keeps keys and values of its own."""
    config = model.config.get_text_config(decoder=True)
    settings = getattr(config, "focus_config", None)
    if model.config.is_encoder_decoder or settings is None or settings["max_dist"] is None or _is_routed(config):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    shared = getattr(config, "num_kv_shared_layers", 0)
    if not kinds <= {"full_attention", "sliding_attention"} or shared:
        return False
    # Those of the decoder: a model of several towers has others
    own = (module for module in model.modules() if getattr(module, "config", None) is config)
    return sum(isinstance(getattr(module, "focus", None), FocusBranch) for module in own) == config.num_hidden_layers


def _sharing() -> ModuleType | None:
    # By name: a saved model brings this file along, and not the sharing, which needs hf_focus installed
    try:
        return import_module("hf_focus.sharing")
    except ModuleNotFoundError:
        return None


@cache
def focus_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The Focus class of a model class: the same object on every call.

    ```python
    FocusLlama = focus_model_class(LlamaForCausalLM)
    model = FocusLlama.from_pretrained("meta-llama/Llama-3.2-1B", focus_config=FocusConfig(max_span=128))
    ```

    Args:
        base: a transformers model class; a Focus model class is returned as it is.

    Raises:
        FocusConfigError: `base` is no model class.
    """
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise FocusConfigError(bad_value("base", base, "a PreTrainedModel subclass"))
    if issubclass(base, FocusMixin):
        return base
    members = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` with FocusA attention.",
        "base_class": base,
        "forward": with_span_penalty(base.forward),
    }
    if base.config_class is not None:
        members["config_class"] = focus_config_class(base.config_class)
        autos = [auto.__name__ for auto, models in auto_models(base.config_class) if models[0] is base]
        # The saved model carries the code that reads it
        members["_auto_class"] = autos[0] if autos else "AutoModel"
    _share_conversions(f"Focus{base.__name__}", base.__name__)
    if base.config_class is not None:
        _share_conversions(MODEL_TYPE_PREFIX + base.config_class.model_type, base.config_class.model_type)
    return type(f"Focus{base.__name__}", (FocusMixin, base), members)


def _unpickled(base: type[PreTrainedModel]) -> PreTrainedModel:
    model_class = focus_model_class(base)
    return model_class.__new__(model_class)


def _share_conversions(new: str, base: str) -> None:
    """transformers keeps the renaming of old checkpoints' weights by class name and model type: ours need it too."""
    mapping = get_checkpoint_conversion_mapping(base)
    if mapping is not None:
        register_checkpoint_conversion_mapping(new, mapping, overwrite=True)


@cache
def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Make every Auto class that has models for the base of a Focus config class have the Focus ones too."""
    base = config_class.base_class
    for auto_class, models in list(auto_models(base)):
        focus_models = tuple(focus_model_class(model) for model in models)
        value = focus_models if len(focus_models) > 1 else focus_models[0]
        auto_class._model_mapping.register(config_class, value, exist_ok=True)
        # By these names Trainer tells whether label smoothing shifts labels, and a pipeline whether it knows a model
        names = tuple(model.__name__ for model in focus_models)
        auto_class._model_mapping._model_mapping[config_class.model_type] = names if len(names) > 1 else names[0]
    for mapping in PREPROCESSORS:
        if base in mapping:
            mapping.register(config_class, mapping[base], exist_ok=True)
    name_tokenizer(config_class.model_type, like=base.model_type)
    name_targets(config_class.model_type, like=base.model_type)


def read_patch(config: PreTrainedConfig) -> tuple[FocusConfig, Architecture | None]:
    """The settings and the architecture saved in a Focus config, or declared; None: to be read from the model.

    Raises:
        FocusConfigError: they are not valid.
    """
    model_type = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    if config.focus_architecture is not None:
        architecture = Architecture.from_dict(model_type, config.focus_architecture)
    else:
        architecture = find_architecture(model_type)
    return FocusConfig.from_dict(config.focus_config), architecture


@dataclass(frozen=True)
class Adoption:
    """The models within a model that become Focus models, and their new configs, by the id of the old one."""

    holders: list[PreTrainedModel]
    configs: dict[int, PreTrainedConfig]


def plan_adoption(
    model: PreTrainedModel, sites: list[Site], focus_config: FocusConfig, architecture: Architecture
) -> Adoption:
    """What `adopt` will do to `model` and to every inner model that holds a patched layer. Changes nothing.

    Configs are replaced by copies, since another model may share the old ones.

    Raises:
        FocusConfigError: the attention of one of them cannot be wrapped.
    """
    holders = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(_is_within(site.path, path) for site in sites)
    }
    # An inner model may be saved alone: its settings are for the paths within it
    # (one that shares its config with the outer one has the outer one's)
    settings = {
        id(holder.config): _settings_within(path, sites, focus_config) for path, holder in reversed(holders.items())
    }
    olds = {id(holder.config): holder.config for holder in reversed(holders.values())}
    # Modules read the attention from their own config, which needs not be a model's
    read = {id(config): config for config in (_own_config(site.module) for site in sites if site.route is None)}
    olds = {**read, **olds}
    configs: dict[int, PreTrainedConfig] = {}
    # The innermost first, since the outer ones hold them
    for key, old in sorted(olds.items(), key=lambda item: _depth(item[1])):
        if is_focus(old):
            continue
        new = to_focus(old, settings.get(key, focus_config), architecture, configs)
        wanted = focus_config.global_attn_implementation or old._attn_implementation or "eager"
        # A forward that does not call the interface reads the name itself, and knows none of ours
        routed = key not in read and _is_routed(new)
        new._attn_implementation_internal = wanted if routed else focus_name(wanted)
        new.focus_replaced_attention = old._attn_implementation
        configs[key] = new
    for holder in holders.values():
        focus_model_class(type(holder))
    return Adoption(list(holders.values()), configs)


def _own_config(module: nn.Module) -> PreTrainedConfig:
    # While adapters are on a layer, its config is one in front of its own
    return module.config if isinstance(module.config, PreTrainedConfig) else module.config.base


def _is_routed(config: PreTrainedConfig) -> bool:
    """Whether the attention that reads this Focus config does not call the interface."""
    model_type = type(config).base_class.model_type
    architecture = read_patch(config)[1]
    if architecture is None:
        return False
    # A part has the name of its own model type, and the whole that of whichever config it was saved in
    return next(item.routed for item in (*architecture.parts, architecture) if item.model_type == model_type)


def _is_within(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}." if outer else "")


def _settings_within(outer: str, sites: list[Site], focus_config: FocusConfig) -> FocusConfig:
    if focus_config.modules is None or not outer:
        return focus_config
    paths = [re.escape(site.path.removeprefix(f"{outer}.")) for site in sites if _is_within(site.path, outer)]
    return replace(focus_config, modules=f"^({'|'.join(paths)})$")


def _depth(config: PreTrainedConfig) -> int:
    return 1 + max((_depth(part) for part in vars(config).values() if isinstance(part, PreTrainedConfig)), default=0)


def adopt(model: PreTrainedModel, adoption: Adoption) -> None:
    """Give the models of a plan their Focus classes and configs."""
    for holder in adoption.holders:
        change_class(holder, focus_model_class(type(holder)))
        # transformers looks up by the class's name what a model can return besides its output (hidden states, …);
        # its registry took the name itself as key before 5.23, and the model since
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(holder)), holder._can_record_outputs)
    repoint(model, adoption.configs)
    for holder in adoption.holders:
        register_models(type(holder.config))


def _check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    ours = {name for name in model.state_dict() if ".focus." in name}
    missing = ours & set(info["missing_keys"])
    # Weights of a part that this model does not have at all are not ours to miss: an encoder without its decoder
    layers = {name for name, _ in model.named_modules()}
    unexpected = {n for n in info["unexpected_keys"] if ".focus." in n and n.partition(".focus.")[0] in layers}
    mismatched = {entry[0] for entry in info["mismatched_keys"]} & ours
    # With none of them present it is a plain checkpoint
    if unexpected or mismatched or (missing and missing != ours):
        found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
        shown = "; ".join(
            f"{what}: {', '.join(sorted(keys)[:3])} ({len(keys)})" for what, keys in found.items() if keys
        )
        raise FocusCheckpointError(
            f"`focus_config` in config.json does not fit the weights beside it: {shown}. Accepted: the config.json"
            " that was saved with these weights, or weights without any of FocusA's."
        )


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`FocusLlamaForCausalLM` and the like, by name, as transformers looks up classes of remote code."""
    base = getattr(transformers, name.removeprefix("Focus"), None) if name.startswith("Focus") else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return focus_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
