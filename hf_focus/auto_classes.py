"""Which of transformers' Auto classes have models for an architecture."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto, tokenization_auto
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

PREPROCESSORS = (TOKENIZER_MAPPING, IMAGE_PROCESSOR_MAPPING, FEATURE_EXTRACTOR_MAPPING, PROCESSOR_MAPPING)


def auto_models(config_class: type[PreTrainedConfig]) -> Iterator[tuple[Any, tuple[type[PreTrainedModel], ...]]]:
    """Every Auto class that has models for a config class of transformers, with these models, the default first."""
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not isinstance(auto_class, type) or not isinstance(mapping, auto_factory._LazyAutoMapping):
            continue
        if config_class in mapping:
            models = mapping[config_class]
            yield auto_class, models if isinstance(models, tuple) else (models,)


def name_tokenizer(model_type: str, like: str) -> None:
    """Let `AutoTokenizer` choose among the classes for a model type as it does for another.

    It chooses by the type's name: the class that a checkpoint names gives way to the one that the type has.
    """
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if like in names:
        names[model_type] = names[like]
    # In this set are types whose checkpoints name a wrong class
    if like in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)
