"""`FocusAdapterModel`: the PEFT tuner that puts FocusA on a model, and takes it off or makes it permanent."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapter_config import FocusAdapterConfig, FocusAdapterFields, FocusPeftType
from .adapter_layer import FocusAdapterLayer, at_most_one
from .branch import FocusBranch
from .configuration import FocusConfig
from .errors import (
    AlreadyPatchedError,
    FocusCheckpointError,
    FocusConfigError,
    UnsupportedArchitectureError,
    bad_value,
)
from .focus_configs import is_focus
from .interface import focus_name, global_name
from .modeling import Adoption, adopt, plan_adoption
from .sites import Site, build_branches, install, plan, with_rotary

# Part of every saved name, and by it transformers finds where the adapter's name goes
CONTAINER = ".focus_branches."


class FocusTuner:
    """What FocusA adds to a tuner class. No module of the base is replaced: each attention layer gets a submodule
    `focus`, and its config names FocusA's attention while an adapter is active."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter `self.peft_config[adapter_name]` on `model`. On an error the model is as before.

        Raises:
            AlreadyPatchedError, FocusCheckpointError, FocusConfigError, NoMatchingLayerError,
            UnsupportedArchitectureError.
        """
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        active = [(module, module.active_adapter) for module in model.modules() if isinstance(module, BaseTunerLayer)]
        try:
            config, sites = plan_adapter(model, self.peft_config[adapter_name], adapter_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                branches = build_branches(sites, config.settings, model.dtype)
            # A copy: the one given may be used for another model
            self.peft_config[adapter_name] = config
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            for module, adapters in active:
                module._active_adapter = adapters
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            self.peft_config.pop(adapter_name, None)
            if not self.peft_config:
                # transformers' add_adapter sets it before it tries
                vars(model).pop("_hf_peft_config_loaded", None)
            raise
        # After all that can fail
        for site in sites:
            attention, branch = model.get_submodule(site.path), branches[site.path]
            layer = getattr(attention, "focus", None)
            if layer is None:
                layer = FocusAdapterLayer(attention)
                layer.set_adapter(self.active_adapters)
            branch.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
            layer.add(adapter_name, branch, site.rotation_hook)
            if site.path not in self.targeted_module_names:
                self.targeted_module_names.append(site.path)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's.

        Raises:
            FocusConfigError: more than one adapter; nothing is switched.
        """
        at_most_one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter. If it was active, the first of those left, by name, becomes active on all layers.

        Raises:
            ValueError: there is no adapter of that name.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        active = (active or sorted(self.peft_config))[:1]
        if active:
            self.set_adapter(active[0], inference_mode=self.peft_config[active[0]].inference_mode)
        else:
            self.active_adapter = []

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """FocusA cannot be merged in place.

        Raises:
            FocusError: always.
        """
        for layer in focus_layers(self.model):
            layer.merge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> PreTrainedModel:
        kept = self._find_merged(adapter_names, safe_merge) if merge else None
        layers = focus_layers(self.model)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.release()
        if kept is not None:
            sites, branches, adoption = kept
            install(sites, {path: branch.to(model.dtype) for path, branch in branches.items()})
            adopt(model, adoption)
            warnings.warn(
                "FocusA's weights cannot be folded into the base's: the merged model carries them and is a"
                f" {type(model).__name__}.",
                stacklevel=3,
            )
        return model

    def _find_merged(
        self, adapter_names: list[str] | None, safe_merge: bool
    ) -> tuple[list[Site], dict[str, FocusBranch], Adoption]:
        names = self.active_adapters if adapter_names is None else adapter_names
        if len(names) != 1 or names[0] not in self.peft_config:
            accepted = f"one of {', '.join(map(repr, self.peft_config))} in a list"
            raise FocusConfigError(bad_value("adapter_names", adapter_names, accepted))
        config = self.peft_config[names[0]]
        architecture = config.find_architecture(self.model)
        sites = plan(self.model, config.settings, architecture)
        branches = {site.path: site.module.focus.focus_branches[names[0]] for site in sites}
        for path, branch in branches.items():
            if safe_merge and not all(parameter.isfinite().all() for parameter in branch.parameters()):
                raise FocusConfigError(
                    bad_value("safe_merge", True, f"False, with NaN or inf in the weights of {path}")
                )
        return sites, branches, plan_adoption(self.model, sites, config.settings, architecture)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Our names go on below the adapter's, by more than PEFT looks for
        if CONTAINER in key:
            return key.replace(f"{CONTAINER}{adapter_name}.", CONTAINER)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FocusAdapterFields, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        wanted = {key: value for key, value in model.state_dict().items() if f"{CONTAINER}{adapter_name}." in key}
        ours = {key for key in found if CONTAINER in key}
        shapes = {key for key in ours & set(wanted) if found[key].shape != wanted[key].shape}
        for what, keys in (("lack", set(wanted) - ours), ("also hold", ours - set(wanted)), ("misshape", shapes)):
            if keys:
                got = f"weights that {what} {min(keys)} ({len(keys)} in all)"
                accepted = f"those that adapter_config.json describes, of a {config.base_model_type} model"
                raise FocusCheckpointError(bad_value("adapter", got, accepted))
        return found


class FocusAdapterModel(FocusTuner, BaseTuner):
    """FocusA alone as a PEFT tuner: what `get_peft_model` makes of a `FocusAdapterConfig`.

    The model's class stays, its weights are frozen and untouched. With adapters disabled its outputs are bit-equal to
    the base's. `merge_and_unload()` returns the model as a `Focus…` class with the active adapter's weights inside;
    `unload()` returns it plain.

    Args:
        model: a model of a supported architecture.
        peft_config: the config, or one for each adapter name.
        adapter_name: the name of the first adapter.
    """

    prefix = "focus_"
    tuner_layer_cls = FocusAdapterLayer

    def _prepare_adapter_config(self, peft_config: FocusAdapterConfig, model_config: dict) -> FocusAdapterConfig:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Never called: no module is replaced."""
        raise NotImplementedError

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Only of `modules_to_save`, and a head need not have the weight that PEFT would copy
        setattr(parent, child_name, new_module)


def focus_layers(model: nn.Module) -> list[FocusAdapterLayer]:
    return [module for module in model.modules() if isinstance(module, FocusAdapterLayer)]


def plan_adapter(
    model: nn.Module, config: FocusAdapterFields, adapter_name: str
) -> tuple[FocusAdapterFields, list[Site]]:
    """Check that an adapter can be put on `model`. Changes nothing.

    Returns:
        a copy of `config` that says what it is put on, and the sites.

    Raises:
        AlreadyPatchedError: the model carries FocusA already.
        FocusCheckpointError: the adapter was made for another architecture or other sizes.
        FocusConfigError, NoMatchingLayerError, UnsupportedArchitectureError: as `apply_focus`.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise FocusConfigError(bad_value("model", kind, "a transformers PreTrainedModel"))
    if any(isinstance(module, PreTrainedModel) and is_focus(module.config) for module in model.modules()):
        raise AlreadyPatchedError(bad_value("model", kind, "a model without FocusA; remove_focus(model) takes it off"))
    model_type = model.config.model_type
    if config.base_model_type not in (None, model_type):
        accepted = f"a model of type {config.base_model_type!r}, which the adapter was made for"
        raise FocusCheckpointError(bad_value("model", f"{kind} of type {model_type}", accepted))
    architecture, settings = config.find_architecture(model), config.settings
    sites = plan(model, settings, architecture)
    _check_attention(sites, settings)
    layers = {site.path: _describe(site) for site in sites}
    if config.focus_layers not in (None, layers):
        path = min(path for path, _ in config.focus_layers.items() ^ layers.items())
        accepted = f"{config.focus_layers.get(path, 'no such layer')!r}, which the adapter was made for"
        raise FocusCheckpointError(bad_value(path, layers.get(path, "no such layer"), accepted))
    _check_name(model, settings, adapter_name)
    config = copy.copy(config)
    config.base_model_type = model_type
    config.focus_architecture = with_rotary(architecture, sites, settings).to_dict()
    config.focus_layers = layers
    return config, sites


def _describe(site: Site) -> str:
    return f"num_heads={site.num_heads} head_dim={site.head_dim} value_head_dim={site.value_head_dim}"


def _check_attention(sites: list[Site], settings: FocusConfig) -> None:
    for site in sites:
        config = getattr(site.module, "config", None)
        if config is None or site.route is not None:
            accepted = "an attention module that reads its attention function's name from its `config`"
            raise UnsupportedArchitectureError(bad_value(site.path, type(site.module).__name__, accepted))
        focus_name(config._attn_implementation)
        current = global_name(config._attn_implementation)
        if settings.global_attn_implementation not in (None, current):
            accepted = f"None or {current!r}, which the model runs on (change it with model.set_attn_implementation)"
            raise FocusConfigError(
                bad_value("global_attn_implementation", settings.global_attn_implementation, accepted)
            )


def _check_name(model: nn.Module, settings: FocusConfig, adapter_name: str) -> None:
    """PEFT leaves out of a saved adapter every name that has another adapter's name as a part, and keeps adapters in
    module dicts, which do not take every name."""
    with torch.device("meta"):
        inner = FocusBranch(settings, 1, 1, 1)
    names = [*(name for name, _ in model.named_modules() if CONTAINER not in name), *inner.state_dict()]
    taken = {part for name in names for part in name.split(".")} | {"", *dir(nn.ModuleDict)}
    if "." in adapter_name or adapter_name in taken:
        accepted = "a name without dots that is not part of the name of a module of the model or of FocusA"
        raise FocusConfigError(bad_value("adapter_name", adapter_name, accepted))


def register_tuner(peft_type: FocusPeftType, config_class: type, tuner_class: type) -> None:
    """Make PEFT know an adapter type. Its own `register_peft_method` takes the types of its enumeration only."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class


register_tuner(FocusPeftType.FOCUS, FocusAdapterConfig, FocusAdapterModel)
PEFT_TYPE_TO_PREFIX_MAPPING[FocusPeftType.FOCUS] = FocusAdapterModel.prefix
