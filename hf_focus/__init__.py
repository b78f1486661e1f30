"""FocusA attention for Hugging Face transformers."""

from contextlib import suppress
from importlib import import_module
from typing import Any

from .architecture import Architecture
from .attention import focus_attention
from .configuration import FocusConfig
from .errors import FocusError
from .focus_cache import FocusCache
from .focus_configs import focus_config_class
from .layer import FocusA
from .modeling import focus_model_class
from .observers import FocusRecord
from .patches import DECLARATIONS
from .patching import apply_focus, fold_feedback, remove_focus
from .problem import FocusOutput
from .recording import record_focus
from .refiner import Refiner
from .registration import register_all, register_architecture
from .span import AdaptiveSpan, Predictor
from .support import supported_architectures

register_all(DECLARATIONS)

# PEFT is optional, and finds an adapter's type only among those registered: with it installed they always are
with suppress(ImportError):
    import_module(".adapter_lora", __name__)

# Public names that not every process needs, and the modules they are imported from when asked for
_ON_DEMAND = {
    "FocusAdapterConfig": "adapter_config",
    "FocusAdapterModel": "adapter_model",
    "FocusLoraConfig": "adapter_lora",
    "FocusLoraModel": "adapter_lora",
    "FocusTrainer": "trainer",
    "finetune": "training",
    "pull_folder": "sharing",
    "push_folder": "sharing",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        # Without PEFT, for an adapter's class, this is the ImportError that says so
        return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AdaptiveSpan",
    "Architecture",
    "FocusA",
    "FocusCache",
    "FocusConfig",
    "FocusError",
    "FocusOutput",
    "FocusRecord",
    "Predictor",
    "Refiner",
    "apply_focus",
    "focus_attention",
    "focus_config_class",
    "focus_model_class",
    "fold_feedback",
    "record_focus",
    "register_architecture",
    "remove_focus",
    "supported_architectures",
]
