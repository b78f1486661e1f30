"""Registration with transformers' Auto classes, so that a Focus checkpoint loads as any other."""

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .architecture import supported_architectures
from .focus_configs import FocusConfigMixin, focus_config_class
from .modeling import register_models


def register_config(model_type: str) -> None:
    """Make `AutoConfig` know `focus_<model_type>`, if transformers has the model type."""
    if model_type in CONFIG_MAPPING:
        config_class = focus_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_all() -> None:
    """Register the configs of all supported architectures, and models as their configs come into use."""
    # Importing the modeling files of every architecture now would take seconds
    FocusConfigMixin.on_create = register_models
    for model_type in supported_architectures():
        register_config(model_type)
