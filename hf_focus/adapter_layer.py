"""`FocusAdapterLayer`: the branches of several adapters on one attention layer, of which at most one acts."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .branch import FocusBranch
from .configuration import FocusConfig
from .errors import FocusConfigError, FocusError, bad_value
from .interface import focus_name
from .rotation_hooks import RotationHook, hand_on_rotation, stop_handing_on
from .span import GlobalTemperature


class AttentionConfig:
    """An attention layer's config as long as adapters are on it: the model's, except for the attention it names.

    That is FocusA around the model's own while an adapter is active, and the model's own otherwise. The model's config
    stays untouched, so `set_attn_implementation` goes on working, and nothing else that shares the config notices.
    """

    def __init__(self, base: PreTrainedConfig, layer: "FocusAdapterLayer") -> None:
        self.base = base
        self.layer = layer

    @property
    def _attn_implementation(self) -> str:
        implementation = self.base._attn_implementation
        return implementation if self.layer.active_branch is None else focus_name(implementation)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for special methods before there is a base
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)


class FocusAdapterLayer(nn.Module, BaseTunerLayer):
    """The submodule `focus` of an attention layer with adapters; to the attention function it is the active branch.

    Args:
        attention: the attention module.
    """

    # Only one container: PEFT finds, saves, freezes and deletes by these names
    adapter_layer_names = ("focus_branches",)

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.focus_branches = nn.ModuleDict()
        self._active_adapter = []
        # In a tuple, because the layer is inside the module that it points to
        self._attention = (attention,)
        self.train(attention.training)

    def add(self, adapter_name: str, branch: FocusBranch, rotation: RotationHook | None) -> None:
        """Take in the branch of one more adapter, and the hook that it needs: which others are told of and leave."""
        attention = self.get_base_layer()
        hand_on_rotation(attention, rotation)
        self.focus_branches[adapter_name] = branch
        attention.add_module("focus", self)
        if not isinstance(attention.config, AttentionConfig):
            attention.config = AttentionConfig(attention.config, self)

    def release(self) -> None:
        """Leave the attention layer as it was before the first adapter."""
        self._give_back_config()
        stop_handing_on(self.get_base_layer())
        del self.get_base_layer().focus

    def _give_back_config(self) -> None:
        attention = self.get_base_layer()
        if isinstance(attention.config, AttentionConfig):
            attention.config = attention.config.base

    @property
    def active_branch(self) -> FocusBranch | None:
        """The branch that acts; None: adapters are disabled, or the active one is not on this layer."""
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.focus_branches:
                    return self.focus_branches[name]
        return None

    @property
    def config(self) -> FocusConfig:
        return self.active_branch.config

    @property
    def causal(self) -> bool | None:
        return self.active_branch.causal

    @property
    def num_heads(self) -> int:
        return self.active_branch.num_heads

    @property
    def head_dim(self) -> int:
        return self.active_branch.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.active_branch.value_head_dim

    @property
    def global_temperature(self) -> GlobalTemperature | None:
        return self.active_branch.global_temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `FocusBranch.forward`, of the active branch."""
        return self.active_branch(*args, **kwargs)

    def get_base_layer(self) -> nn.Module:
        return self._attention[0]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's.

        Raises:
            FocusConfigError: more than one adapter.
        """
        super().set_adapter(at_most_one(adapter_names), inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop the branch of an adapter. If it was active, none is: PEFT would let every layer choose another."""
        if adapter_name in self.active_adapters:
            self.set_adapter([])
        super().delete_adapter(adapter_name)
        if not self.focus_branches:
            # apply_focus may come next, and would not replace ours
            self._give_back_config()
            stop_handing_on(self.get_base_layer())

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """FocusA cannot be merged in place.

        Raises:
            FocusError: always.
        """
        raise FocusError(
            "FocusA's weights cannot be folded into the base's. merge_and_unload() gives a Focus… model with both."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.focus_branches:
            # The attention layer's own weights come first among its parameters
            self.focus_branches[adapter_name].to(device or next(self.get_base_layer().parameters()).device)


def at_most_one(adapter_names: str | list[str]) -> list[str]:
    """The adapters to activate, as a list.

    Raises:
        FocusConfigError: more than one.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if len(names) > 1:
        raise FocusConfigError(
            bad_value("adapter_name", names, "one adapter at a time: those of FocusA do not add up")
        )
    return names
