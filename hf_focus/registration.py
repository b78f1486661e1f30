"""Registration with transformers' Auto classes, so that a Focus checkpoint loads as any other."""

from functools import cache

from transformers import AutoConfig
from transformers.models.auto import auto_factory, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from .architecture import supported_architectures
from .focus_configs import FocusConfigMixin, focus_config_class
from .interface import register_interface
from .modeling import focus_model_class

PREPROCESSORS = (TOKENIZER_MAPPING, IMAGE_PROCESSOR_MAPPING, FEATURE_EXTRACTOR_MAPPING, PROCESSOR_MAPPING)


def register_config(model_type: str) -> None:
    """Make `AutoConfig` know `focus_<model_type>`, if transformers has the model type."""
    if model_type in CONFIG_MAPPING:
        config_class = focus_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


@cache
def register_models(config_class: type) -> None:
    """Make every Auto class that has models for the base config have the Focus ones too."""
    base = config_class.base_class
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not isinstance(mapping, auto_factory._LazyAutoMapping) or base not in mapping:
            continue
        models = mapping[base]
        models = models if isinstance(models, tuple) else (models,)
        focus_models = tuple(focus_model_class(model) for model in models if model is not None)
        mapping.register(config_class, focus_models if len(focus_models) > 1 else focus_models[0], exist_ok=True)
    for mapping in PREPROCESSORS:
        if base in mapping:
            mapping.register(config_class, mapping[base], exist_ok=True)


def register_all() -> None:
    """Register attention, configs of all supported architectures, and models as their configs come into use."""
    register_interface()
    # Importing the modeling files of every architecture now would take seconds
    FocusConfigMixin.on_create = register_models
    for model_type in supported_architectures():
        register_config(model_type)
