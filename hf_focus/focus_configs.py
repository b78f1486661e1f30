"""Config classes of patched architectures: `FocusLlamaConfig(LlamaConfig)`, made on demand for any config class."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig

from .architecture import Architecture
from .configuration import EARLIER, FocusConfig
from .errors import FocusCheckpointError, FocusConfigError, bad_value
from .interface import global_name

MODEL_TYPE_PREFIX = "focus_"
# Of what is saved: raised when older code could not read it rightly
# 2: what is fed back may be rotated; 3: which layers rotate is saved
FORMAT = 3


class FocusConfigMixin:
    """What FocusA adds to an architecture's config: three entries of config.json.

    focus_format: version of the format it was saved in.
    focus_config: the `FocusConfig`, as a dict.
    focus_architecture: the `Architecture` it was patched by, as a dict, so that the patch can be rebuilt where the
        architecture is not declared; None until a model is made.
    """

    # Run on every new config: registration.py uses it to register the model classes that go with it
    on_create: ClassVar[Callable[[type], None] | None] = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.focus_config = FocusConfig.build(self.focus_config).to_dict()
        if FocusConfigMixin.on_create is not None:
            FocusConfigMixin.on_create(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made on demand: what pickles is how to make it
        return _unpickled, (self.base_class,), self.__dict__

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # What a live model had before it was patched is of no use to a saved one
        values.pop("focus_replaced_attention", None)
        # The outermost config says all that is needed to patch the models within again; and code that does not know
        # ours reads their types
        for name, part in _parts(self).items():
            if is_focus(part):
                values[name] = to_base(part).to_dict()
                values[name].pop("transformers_version", None)
        return values

    @property
    def output_attentions(self) -> bool:
        """As transformers': whether models return attention weights, which eager attention alone has."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        if value and global_name(self._attn_implementation) == "eager":
            self._output_attentions = value
        else:
            PreTrainedConfig.output_attentions.fset(self, value)

    def validate(self) -> None:
        """As transformers', which knows the attention that FocusA wraps and not `"focus|eager"`."""
        plain = copy.copy(self)
        plain._attn_implementation_internal = global_name(self._attn_implementation)
        super(FocusConfigMixin, plain).validate()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with `focus_config=` accepted as a `FocusConfig` too. What a dict does not name stays as
        it was saved.

        Raises:
            FocusCheckpointError: a Focus model's config.json without a valid `focus_config`.
        """
        config_dict, override = dict(config_dict), kwargs.pop("focus_config", None)
        if override is not None and not isinstance(override, Mapping):
            config_dict["focus_config"] = FocusConfig.build(override).to_dict()
        if config_dict.get("model_type") == cls.model_type:
            saved = config_dict.get("focus_format")
            if not isinstance(saved, int) or saved > FORMAT:
                accepted = f"a format up to {FORMAT}; a newer hf_focus, or trust_remote_code=True, reads newer ones"
                raise FocusCheckpointError(bad_value("focus_format", saved, accepted))
            settings = config_dict.get("focus_config")
            if saved < 2 and isinstance(settings, dict):
                config_dict["focus_config"] = {**EARLIER, **settings}
            try:
                FocusConfig.from_dict(config_dict.get("focus_config"))
                if (architecture := config_dict.get("focus_architecture")) is not None:
                    Architecture.from_dict(cls.base_class.model_type, architecture)
            except FocusConfigError as error:
                raise FocusCheckpointError(
                    f"config.json of this {cls.model_type} cannot be rebuilt: {error}"
                ) from error
        if isinstance(override, Mapping):
            config_dict["focus_config"] = FocusConfig.build(config_dict.get("focus_config"), **override).to_dict()
        config_dict["focus_format"] = FORMAT
        # A plain checkpoint loads into a Focus class: its type is the base's
        config_dict["model_type"] = cls.model_type
        return super().from_dict(config_dict, **kwargs)


@cache
def focus_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The Focus config class of an architecture's config class: the same object on every call.

    Args:
        base: for example `LlamaConfig`; a Focus config class is returned as it is.

    Raises:
        FocusConfigError: `base` is no config class of a model type.
    """
    if not (isinstance(base, type) and issubclass(base, PreTrainedConfig) and base.model_type):
        raise FocusConfigError(bad_value("base", base, "a PreTrainedConfig subclass with a model_type"))
    if issubclass(base, FocusConfigMixin):
        return base
    return type(
        f"Focus{base.__name__}",
        (FocusConfigMixin, base),
        {
            "__module__": __name__,
            "__doc__": f"`{base.__name__}` of a model patched with FocusA.",
            "__annotations__": {"focus_format": int, "focus_config": dict | None, "focus_architecture": dict | None},
            "model_type": MODEL_TYPE_PREFIX + base.model_type,
            # The saved config carries the code that reads it
            "_auto_class": "AutoConfig",
            "focus_format": FORMAT,
            "focus_config": None,
            "focus_architecture": None,
            "base_class": base,
        },
    )


def _unpickled(base: type[PreTrainedConfig]) -> PreTrainedConfig:
    config_class = focus_config_class(base)
    return config_class.__new__(config_class)


def to_focus(
    config: PreTrainedConfig,
    focus_config: FocusConfig,
    architecture: Architecture | None,
    parts: dict[int, PreTrainedConfig] | None = None,
) -> PreTrainedConfig:
    """A copy of a config as its Focus class.

    Args:
        architecture: None where it will be read from the model.
        parts: replacements of configs within it, by the id of the old one; the others are shared with the old config.
    """
    config = _copy(config, parts or {})
    _change_class(config, focus_config_class(type(config)))
    config.focus_format = FORMAT
    config.focus_config = focus_config.to_dict()
    config.focus_architecture = None if architecture is None else architecture.to_dict()
    return config


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Configs that a config holds, of a multimodal model's towers for example, by the name it holds them under."""
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _copy(config: PreTrainedConfig, parts: dict[int, PreTrainedConfig]) -> PreTrainedConfig:
    # A model's modules hold the very objects that its config holds: a copy must go on doing so
    memo = {id(part): parts.get(id(part), part) for part in _parts(config).values()}
    return copy.deepcopy(config, memo)


def is_focus(config: PreTrainedConfig) -> bool:
    """Whether a config is of a Focus class: by what it has, since as remote code the class exists twice."""
    return getattr(config, "focus_config", None) is not None


def _change_class(config: PreTrainedConfig, new: type[PreTrainedConfig]) -> None:
    config.__class__ = new
    if "model_type" in vars(config):
        # Read from a file, it holds its type itself
        vars(config)["model_type"] = new.model_type


def with_plain_parts(config: PreTrainedConfig) -> PreTrainedConfig:
    """A Focus config whose parts are none: what a model is built from, which adopts its parts when they are there.

    It is a copy where it has such parts: they belong to the live model that the config comes from.
    """
    done: dict[int, PreTrainedConfig] = {}
    parts = {id(part): to_base(part, done) for part in _parts(config).values() if is_focus(part)}
    return _copy(config, parts) if parts else config


def to_base(config: PreTrainedConfig, done: dict[int, PreTrainedConfig] | None = None) -> PreTrainedConfig:
    """A copy of a Focus config, and of those within it, as the architecture's own class, with nothing of ours left.

    Args:
        done: copies made so far, by the id of the Focus config; filled.
    """
    done = {} if done is None else done
    if id(config) in done:
        return done[id(config)]
    original = config
    parts = {id(part): to_base(part, done) for part in _parts(config).values() if is_focus(part)}
    config = _copy(config, parts)
    attention = global_name(config._attn_implementation)
    if attention == config.focus_config["global_attn_implementation"]:
        # It was FocusA's choice, not the model's
        attention = getattr(config, "focus_replaced_attention", attention)
    _change_class(config, type(config).base_class)
    config._attn_implementation_internal = attention
    for name in ("focus_format", "focus_config", "focus_architecture", "focus_replaced_attention", "auto_map"):
        vars(config).pop(name, None)
    done[id(original)] = config
    return config


def repoint(model: nn.Module, configs: dict[int, PreTrainedConfig]) -> None:
    """Replace configs, given by the id of the old one, in every module and in every config of one that holds one."""
    for module in model.modules():
        for name, value in vars(module).items():
            if not isinstance(value, PreTrainedConfig):
                continue
            if id(value) in configs:
                setattr(module, name, configs[id(value)])
            for part_name, part in vars(value).items():
                if isinstance(part, PreTrainedConfig) and id(part) in configs and is_focus(value):
                    setattr(value, part_name, configs[id(part)])


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """`FocusLlamaConfig` and the like, by name, as transformers looks up classes of remote code."""
    base = getattr(transformers, name.removeprefix("Focus"), None) if name.startswith("Focus") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return focus_config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
