"""Which model types of the installed transformers FocusA can patch, told without importing any of their models."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from .architecture import declared_architectures
from .focus_configs import MODEL_TYPE_PREFIX

# What the source of a reached model says: it asks for its attention, or it is made of other models
_REACHED = ("ALL_ATTENTION_FUNCTIONS", "AutoModel.from_config", "AutoModelForCausalLM.from_config", "load_backbone")


def supported_architectures() -> list[str]:
    """The model types that `apply_focus` can patch, sorted: of transformers' Auto classes, and the declared ones.

    A type that is made of other models (a multimodal one) is listed; whether a given one can be patched depends on
    what it is made of.
    """
    return sorted({name for name in auto_model_types() if _is_reached(name)} | declared_architectures().keys())


def auto_model_types() -> dict[str, list[str]]:
    """Every model type of transformers that an Auto class has a model for, with the names of these mappings."""
    found: dict[str, list[str]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            for model_type in mapping:
                if model_type.startswith(MODEL_TYPE_PREFIX):
                    # Of a model that was patched in this process
                    continue
                found.setdefault(model_type, []).append(name.removesuffix("_MAPPING_NAMES"))
    return found


@cache
def _is_reached(model_type: str) -> bool:
    # Types that share a config share its models: GPT-SW3 is a GPT-2
    config = CONFIG_MAPPING_NAMES.get(model_type)
    types = {name for name, other in CONFIG_MAPPING_NAMES.items() if other == config} | {model_type}
    return any(_says_so(model_type_to_module_name(name)) for name in types)


@cache
def _says_so(module: str) -> bool:
    folder = Path(find_spec("transformers").origin).parent / "models" / module
    sources = [file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")]
    if any(word in source for source in sources for word in _REACHED):
        return True
    # Made of another family's models, by import
    others = {
        name for source in sources for name in re.findall(r"^from \.\.(\w+)(?:\.modeling\w+)? import", source, re.M)
    }
    return any(_says_so(name) for name in others - {"auto", module})
