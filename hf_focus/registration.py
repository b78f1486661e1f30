"""Registration with transformers' Auto classes, so that a Focus checkpoint loads as any other."""

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .architecture import Architecture, declare
from .focus_configs import FocusConfigMixin, focus_config_class
from .modeling import register_models


def register_config(model_type: str) -> None:
    """Make `AutoConfig` know `focus_<model_type>`, if transformers has the model type."""
    if model_type in CONFIG_MAPPING:
        config_class = focus_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_architecture(architecture: Architecture | str, **settings: Any) -> Architecture:
    """Declare an architecture, so that `apply_focus` and the Auto classes know it, in this process.

    ```python
    register_architecture("my_model", attention="MyAttention")
    ```

    Args:
        architecture: an `Architecture`, or a model type with the rest as keywords.
        settings: of the `Architecture`.

    Raises:
        FocusConfigError: a setting that is not accepted.
    """
    architecture = declare(architecture, **settings)
    register_config(architecture.model_type)
    return architecture


def register_all(architectures: Iterable[Architecture]) -> None:
    """Register the configs of these architectures, and models as their configs come into use."""
    # Importing the modeling files of every architecture now would take seconds
    FocusConfigMixin.on_create = register_models
    for architecture in architectures:
        register_architecture(architecture)
