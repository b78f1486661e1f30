"""What identifies the self-attention of an architecture: declarations, and the registry of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import FocusConfigError, bad_value
from .iteration import ROTARY_PAIRS

# Attention to another sequence, by the name that models give the module
CROSS_ATTENTION = r"(^|\.)(encoder_attn|x_attn|EncDecAttention|\w*cross_?att(n|ention)\w*)(\.|$)"
# Where models keep their sizes: the first name found on the module, or else on its config, is taken
NUM_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "nhead",
    "num_head",
    "decoder_self_attention_heads",
)
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
VALUE_HEAD_DIM = ("v_head_dim", "value_head_dim")
# All heads together: what is divided among them where nothing names the size of one
WIDTH = ("embed_dim", "hidden_size", "d_model", "dim", "n_embd", "internal_dim")


_KINDS = (
    ("routed", bool, "True or False"),
    ("bias", bool, "True or False"),
    ("scaling", str | int | float | None, "None, a number or the name of an attribute"),
    ("causal", bool | str | None, "None, True, False or the name of an attribute"),
)


@dataclass(frozen=True)
class Architecture:
    """How FocusA finds the self-attention of one model type. Saved in config.json with the model.

    Args:
        model_type: the `model_type` of the architecture's config.
        attention: class names of its self-attention modules, whose forward calls transformers' `AttentionInterface`.
        exclude: regular expression: modules whose path it finds are left alone (cross-attention, by default).
        unless: attribute of the module: where it is more than 1, or a module, the keys are not the tokens (pooled or
            compressed ones, for example), and the module is left alone.
        num_heads, head_dim, value_head_dim: attribute that holds the size, on the attention module or its config;
            None: the usual names are tried. `value_head_dim` is `head_dim` where nothing names it.
        routed: whether the attention does not call the interface, and computes softmax(q·kᵀ·scaling + …)·v in its own
            forward: FocusA then takes its place between the last product and what follows (see routing.py).
        scaling: with `routed`: what the product of queries and keys in its code is multiplied by: a number, the
            attribute that holds it, or None: head_dim ** -0.5. 1 where queries or keys are scaled before the product.
        bias: with `routed`: whether the scores have a part that depends on positions (ALiBi, relative positions).
        causal: whether its tokens see only the past: True, False, or an attribute of the module or its config that
            says so; None: `is_causal` of the module, False where it has none.
        parts: declarations of model types within this one (the text model of a multimodal one), which go first.
        rotary: class name of attention -> which features of a query it rotates together, `"halves"` or
            `"neighbours"` (see `iteration.turn`); classes that are not in it do not rotate. None: found in the code of
            the model; what was found is saved with it, so that a release in which the class does otherwise is refused.
            That of a part goes before that of the whole.
    """

    model_type: str
    attention: tuple[str, ...]
    exclude: str = CROSS_ATTENTION
    unless: str | None = None
    num_heads: str | None = None
    head_dim: str | None = None
    value_head_dim: str | None = None
    routed: bool = False
    scaling: str | float | None = None
    bias: bool = False
    causal: bool | str | None = None
    parts: tuple["Architecture", ...] = ()
    rotary: Mapping[str, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        names = [self.attention] if isinstance(self.attention, str) else self.attention
        for name in ("unless", "num_heads", "head_dim", "value_head_dim"):
            if not isinstance(getattr(self, name), str | None):
                raise FocusConfigError(bad_value(name, getattr(self, name), "None or the name of an attribute"))
        if not isinstance(self.model_type, str) or not self.model_type:
            raise FocusConfigError(bad_value("model_type", self.model_type, "a non-empty string"))
        for name, kinds, accepted in _KINDS:
            if not isinstance(getattr(self, name), kinds):
                raise FocusConfigError(bad_value(name, getattr(self, name), accepted))
        if not isinstance(self.parts, (tuple, list)) or not all(isinstance(part, Architecture) for part in self.parts):
            raise FocusConfigError(bad_value("parts", self.parts, "a list of Architecture"))
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.rotary is not None:
            known = isinstance(self.rotary, Mapping) and all(
                isinstance(name, str) and pairs in ROTARY_PAIRS for name, pairs in self.rotary.items()
            )
            if not known:
                accepted = f"None or a dict of class names and {' or '.join(map(repr, ROTARY_PAIRS))}"
                raise FocusConfigError(bad_value("rotary", self.rotary, accepted))
            object.__setattr__(self, "rotary", dict(self.rotary))
        listed = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
        if not listed or not (names or self.parts):
            raise FocusConfigError(bad_value("attention", self.attention, "one or more class names"))
        object.__setattr__(self, "attention", tuple(names))
        try:
            re.compile(self.exclude)
        except (re.error, TypeError) as error:
            raise FocusConfigError(bad_value("exclude", self.exclude, "a regular expression")) from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the model type: a config's `from_pretrained` takes any entry of
        config.json with a `model_type` in it for the config itself."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model_type"}
        return {
            **values,
            "attention": list(self.attention),
            "parts": {part.model_type: part.to_dict() for part in self.parts},
        }

    @classmethod
    def from_dict(cls, model_type: str, values: dict[str, Any]) -> "Architecture":
        """The inverse of `to_dict`.

        Raises:
            FocusConfigError: `values` is no dict of an architecture's settings, or one of them is not accepted.
        """
        known = {field.name for field in fields(cls)} - {"model_type"}
        if not isinstance(values, dict) or not {"attention"} <= set(values) <= known:
            raise FocusConfigError(bad_value("focus_architecture", values, f"a dict of {', '.join(sorted(known))}"))
        parts = values.get("parts", ())
        if isinstance(parts, dict):
            values = {**values, "parts": [cls.from_dict(name, part) for name, part in parts.items()]}
        return cls(model_type, **values)

    def of(self, path: str, module: object) -> "Architecture | None":
        """The declaration, this one or a part, that makes the module at `path` a self-attention; None: it is none."""
        for architecture in (*self.parts, self):
            if type(module).__name__ in architecture.attention and not re.search(architecture.exclude, path):
                return None if architecture._is_left_alone(module) else architecture
        return None

    def _is_left_alone(self, module: object) -> bool:
        value = getattr(module, self.unless, None) if self.unless else None
        return value is not None and (not isinstance(value, (int, float)) or value > 1)


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


def declared_architectures() -> dict[str, Architecture]:
    """What is declared, by model type: what comes with hf_focus and what was registered since."""
    return dict(_ARCHITECTURES)


def find_architecture(model_type: str) -> Architecture | None:
    """The declaration of a model type, None where it needs or has none."""
    return _ARCHITECTURES.get(model_type)
