"""What identifies the self-attention of an architecture: declarations, and the registry of them."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import FocusConfigError, UnsupportedArchitectureError, bad_value

# Attention to another sequence, by the name that models give the module
CROSS_ATTENTION = r"(^|\.)(encoder_attn|cross_attn|crossattention|EncDecAttention|cross_attention)(\.|$)"
# Where models keep their sizes: the first name found on the module, or else on its config, is taken
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
VALUE_HEAD_DIM = ("v_head_dim", "value_head_dim")


@dataclass(frozen=True)
class Architecture:
    """How FocusA finds the self-attention of one model type. Saved in config.json with the model.

    Args:
        model_type: the `model_type` of the architecture's config.
        attention: class names of its self-attention modules, whose forward calls transformers' `AttentionInterface`.
        exclude: regular expression: modules whose path it finds are left alone (cross-attention, by default).
        num_heads, head_dim, value_head_dim: attribute that holds the size, on the attention module or its config;
            None: the usual names are tried. `value_head_dim` is `head_dim` where nothing names it.
    """

    model_type: str
    attention: tuple[str, ...]
    exclude: str = CROSS_ATTENTION
    num_heads: str | None = None
    head_dim: str | None = None
    value_head_dim: str | None = None

    def __post_init__(self) -> None:
        names = [self.attention] if isinstance(self.attention, str) else self.attention
        for name in ("num_heads", "head_dim", "value_head_dim"):
            if not isinstance(getattr(self, name), str | None):
                raise FocusConfigError(bad_value(name, getattr(self, name), "None or the name of an attribute"))
        if not isinstance(self.model_type, str) or not self.model_type:
            raise FocusConfigError(bad_value("model_type", self.model_type, "a non-empty string"))
        if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
            raise FocusConfigError(bad_value("attention", self.attention, "one or more class names"))
        object.__setattr__(self, "attention", tuple(names))
        try:
            re.compile(self.exclude)
        except (re.error, TypeError) as error:
            raise FocusConfigError(bad_value("exclude", self.exclude, "a regular expression")) from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the model type: a config's `from_pretrained` takes any entry of
        config.json with a `model_type` in it for the config itself."""
        values = {**asdict(self), "attention": list(self.attention)}
        del values["model_type"]
        return values

    @classmethod
    def from_dict(cls, model_type: str, values: dict[str, Any]) -> "Architecture":
        """The inverse of `to_dict`.

        Raises:
            FocusConfigError: `values` is no dict of an architecture's settings, or one of them is not accepted.
        """
        known = {field.name for field in fields(cls)} - {"model_type"}
        if not isinstance(values, dict) or not {"attention"} <= set(values) <= known:
            raise FocusConfigError(bad_value("focus_architecture", values, f"a dict of {', '.join(sorted(known))}"))
        return cls(model_type, **values)


_ARCHITECTURES: dict[str, Architecture] = {}


def declare(architecture: Architecture | str, **settings: Any) -> Architecture:
    """Enter an architecture into the registry.

    Args:
        architecture: an `Architecture`, or a model type with the rest as keywords.

    Raises:
        FocusConfigError: a setting that is not accepted.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.from_dict(architecture, {"attention": None, **settings})
    _ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def supported_architectures() -> list[str]:
    """The model types that `apply_focus` knows, sorted: those that come with hf_focus and those registered since."""
    return sorted(_ARCHITECTURES)


def find_architecture(model_type: str) -> Architecture:
    """The declaration of a model type.

    Raises:
        UnsupportedArchitectureError: nothing is declared for it.
    """
    if model_type not in _ARCHITECTURES:
        accepted = ", ".join(supported_architectures()) or "none"
        raise UnsupportedArchitectureError(
            bad_value("model_type", model_type, accepted)
            + f' Declare another with hf_focus.register_architecture("{model_type}", attention="ItsAttentionClass"),'
            " if its attention calls transformers' AttentionInterface."
        )
    return _ARCHITECTURES[model_type]
