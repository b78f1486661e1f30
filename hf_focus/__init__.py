"""FocusA attention for Hugging Face transformers."""

from .architecture import Architecture, register_architecture, supported_architectures
from .attention import focus_attention
from .configuration import FocusConfig
from .focus_configs import focus_config_class
from .layer import FocusA
from .modeling import focus_model_class
from .patches import DECLARATIONS
from .patching import apply_focus, remove_focus
from .problem import FocusOutput
from .recording import FocusRecord, record_focus
from .refiner import Refiner
from .registration import register_all
from .span import AdaptiveSpan, Predictor

for _architecture in DECLARATIONS:
    register_architecture(_architecture)
register_all()

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSpan",
    "Architecture",
    "FocusA",
    "FocusConfig",
    "FocusOutput",
    "FocusRecord",
    "Predictor",
    "Refiner",
    "apply_focus",
    "focus_attention",
    "focus_config_class",
    "focus_model_class",
    "record_focus",
    "register_architecture",
    "remove_focus",
    "supported_architectures",
]
