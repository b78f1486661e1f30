"""`FocusAdapterConfig`: FocusA as a PEFT method, and what adapters with FocusA in them say in adapter_config.json."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel

from .architecture import Architecture
from .configuration import EARLIER, FocusConfig
from .discovery import architecture_of
from .errors import FocusConfigError, bad_value


class FocusPeftType(str, Enum):
    """FocusA's entries of `peft_type`. PEFT's own enumeration is closed; its tables take any string-like key."""

    FOCUS = "FOCUS"
    FOCUS_LORA = "FOCUS_LORA"


@dataclass
class FocusAdapterFields:
    """What FocusA adds to a PEFT config. Only `focus_config` is set by hand.

    Args:
        focus_config: a `FocusConfig`, a dict of its settings, or None for the defaults. Kept as a dict of all.
        focus_architecture: the `Architecture` it was put on by, as a dict, so that it can be put on again where the
            architecture is not declared. Filled in when the adapter is put on a model, as are the next two.
        base_model_type: the model type that the weights belong to.
        focus_layers: path -> sizes of the attention layers that the weights belong to.
    """

    focus_config: FocusConfig | dict[str, Any] | None = None
    focus_architecture: dict[str, Any] | None = None
    base_model_type: str | None = None
    focus_layers: dict[str, str] | None = None

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            FocusConfigError: a setting of the wrong type or out of range.
        """
        tasks = list(TaskType)
        if self.task_type is not None and self.task_type not in tasks:
            accepted = f"None, {', '.join(task.value for task in tasks)}"
            raise FocusConfigError(bad_value("task_type", self.task_type, accepted))
        if self.focus_layers is not None and isinstance(self.focus_config, dict):
            # Saved, with every setting there was
            self.focus_config = {**EARLIER, **self.focus_config}
        settings = FocusConfig.build(self.focus_config)
        if settings.span_penalty:
            accepted = "0: an adapter leaves the model's loss as it is; apply_focus adds the penalty to it"
            raise FocusConfigError(bad_value("span_penalty", settings.span_penalty, accepted))
        if settings.global_rotation < 1:
            accepted = "1.0: an adapter leaves the base as it is, where apply_focus changes how it rotates"
            raise FocusConfigError(bad_value("global_rotation", settings.global_rotation, accepted))
        self.focus_config = settings.to_dict()
        if self.focus_architecture is not None:
            Architecture.from_dict(self.base_model_type, self.focus_architecture)

    @property
    def settings(self) -> FocusConfig:
        """`focus_config` as a `FocusConfig`."""
        return FocusConfig.from_dict(self.focus_config)

    def find_architecture(self, model: PreTrainedModel) -> Architecture:
        """The declaration that the adapter brings, or else the model's.

        Raises:
            UnsupportedArchitectureError: there is neither.
        """
        if self.focus_architecture is not None:
            return Architecture.from_dict(model.config.model_type, self.focus_architecture)
        return architecture_of(model)


@dataclass
class FocusAdapterConfig(FocusAdapterFields, PeftConfig):
    """FocusA alone, as a PEFT method: the base's weights are frozen and stay out of the saved adapter.

    ```python
    model = get_peft_model(base, FocusAdapterConfig(focus_config=FocusConfig(max_span=128), task_type="CAUSAL_LM"))
    ```

    Args:
        modules_to_save: names of modules of the base to train in full and save too, such as a new head.
        task_type, inference_mode, base_model_name_or_path, revision: as in every `PeftConfig`.
        focus_config and the rest: see `FocusAdapterFields`.

    Raises:
        FocusConfigError: a setting of the wrong type or out of range.
    """

    modules_to_save: list[str] | None = None

    # PEFT reads it of every config; this value makes it replace no module
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()
        self.peft_type = FocusPeftType.FOCUS
