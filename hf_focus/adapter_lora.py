"""LoRA and FocusA in one adapter: `FocusLoraConfig` takes all of LoRA's settings and a `FocusConfig`."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer

from .adapter_config import FocusAdapterFields, FocusPeftType
from .adapter_layer import FocusAdapterLayer
from .adapter_model import FocusTuner, register_tuner
from .errors import FocusError


@dataclass
class FocusLoraConfig(FocusAdapterFields, LoraConfig):
    """LoRA on the base's weights and FocusA beside its attention, trained, saved and loaded as one adapter.

    ```python
    model = get_peft_model(base, FocusLoraConfig(r=8, focus_config=FocusConfig(max_span=128)))
    ```

    Whoever loads the folder gets both or an error. (`LoraConfig(modules_to_save=["focus"])` on a patched model saves
    the same weights, and PEFT drops FocusA's without a word when the base it loads them on is not patched.)

    Args:
        focus_config and the rest: see `FocusAdapterFields`; all others as `LoraConfig`.

    Raises:
        FocusConfigError: a setting of FocusA of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()
        self.peft_type = FocusPeftType.FOCUS_LORA


class FocusLoraModel(FocusTuner, LoraModel):
    """LoRA's tuner with FocusA. `merge_and_unload()` folds LoRA into the base's weights and keeps FocusA's beside
    them, in a `Focus…` model."""

    tuner_layer_cls = (LoraLayer, FocusAdapterLayer)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for FocusA.

        Raises:
            FocusError: always: LoRA's weights add up, FocusA's do not.
        """
        raise FocusError("add_weighted_adapter: LoRA's weights can be added up, FocusA's cannot.")


# No prefix: transformers then looks for those of both
register_tuner(FocusPeftType.FOCUS_LORA, FocusLoraConfig, FocusLoraModel)
