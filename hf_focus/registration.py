"""Registration with transformers' Auto classes, so that a Focus checkpoint loads as any other."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .architecture import Architecture, declare
from .focus_configs import MODEL_TYPE_PREFIX, FocusConfigMixin, focus_config_class
from .modeling import register_models


class FocusTypes(dict[str, type[PreTrainedConfig]]):
    """Registered config classes by model type, and `focus_x` for every x that transformers knows, made when asked for.

    It takes the place of the plain dict in which transformers keeps what was registered: to register every Focus
    config at import would take seconds, and types that a user registers later have theirs too.
    """

    def __contains__(self, name: object) -> bool:
        base = _base_of(name)
        return super().__contains__(name) or (base is not None and base in CONFIG_MAPPING)

    def __missing__(self, name: str) -> type[PreTrainedConfig]:
        base = _base_of(name)
        if base is None or base not in CONFIG_MAPPING:
            raise KeyError(name)
        self[name] = focus_config_class(CONFIG_MAPPING[base])
        return self[name]


def _base_of(name: object) -> str | None:
    prefixed = isinstance(name, str) and name.startswith(MODEL_TYPE_PREFIX)
    return name.removeprefix(MODEL_TYPE_PREFIX) if prefixed else None


def register_architecture(architecture: Architecture | str, **settings: Any) -> Architecture:
    """Declare an architecture that cannot be read from the model itself, in this process.

    ```python
    register_architecture("my_model", attention="MyAttention", num_heads="my_heads")
    ```

    Args:
        architecture: an `Architecture`, or a model type with the rest as keywords.
        settings: of the `Architecture`.

    Raises:
        FocusConfigError: a setting that is not accepted.
    """
    return declare(architecture, **settings)


def register_all(architectures: Iterable[Architecture]) -> None:
    """Declare these architectures; make `AutoConfig` know every Focus config, and the Auto classes their models."""
    # Importing the modeling files of every architecture now would take minutes
    FocusConfigMixin.on_create = register_models
    if not isinstance(CONFIG_MAPPING._extra_content, FocusTypes):
        CONFIG_MAPPING._extra_content = FocusTypes(CONFIG_MAPPING._extra_content)
    for architecture in architectures:
        register_architecture(architecture)
