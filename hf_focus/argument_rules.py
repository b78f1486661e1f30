"""What makes a dataclass one of arguments: each field is checked by a rule, and explained by the docstring."""

import re
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import FocusConfigError, bad_value
from .rules import BELOW_ONE, BETWEEN_ZERO_AND_ONE, BOOL, NON_NEGATIVE, Rule, int_from, number, optional

_COUNT = int_from(1)
_WHOLE = int_from(0)
_POSITIVE = number("a number > 0", lambda value: value > 0)
_NAME = Rule("a non-empty string", lambda value: isinstance(value, str) and bool(value.strip()))

_RULES = {
    "model_name_or_path": optional(_NAME),
    "lora_rank": _WHOLE,
    "lora_alpha": optional(_POSITIVE),
    "lora_dropout": BELOW_ONE,
    "eval_share": BELOW_ONE,
    "block_size": optional(int_from(2)),
    "doc_stride": optional(_WHOLE),
    "shuffle_buffer": _WHOLE,
    "max_train_examples": optional(_COUNT),
    "max_eval_examples": optional(_COUNT),
    "mlm_probability": BETWEEN_ZERO_AND_ONE,
    "output_dir": _NAME,
    "seed": _WHOLE,
    "num_epochs": _POSITIVE,
    "max_steps": optional(_COUNT),
    "batch_size": _COUNT,
    "eval_batch_size": optional(_COUNT),
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _POSITIVE,
    "focus_learning_rate": optional(_POSITIVE),
    "weight_decay": NON_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": optional(_POSITIVE),
    "warmup_share": BELOW_ONE,
    "logging_steps": _COUNT,
    "eval_steps": optional(_COUNT),
    "early_stopping_patience": optional(_COUNT),
    "early_stopping_threshold": NON_NEGATIVE,
    "greater_is_better": optional(BOOL),
    "metric_for_best_model": _NAME,
    "torch_compile_backend": _NAME,
    "save_steps": optional(_COUNT),
    "save_limit": optional(_COUNT),
    "num_processes": optional(_COUNT),
    "num_workers": _WHOLE,
    "hub_model_id": optional(_NAME),
}


def setting_texts(cls: type) -> dict[str, str]:
    """What the docstring of a class of settings says about each of them."""
    section = cleandoc(cls.__doc__).partition("Args:")[2].partition("Raises:")[0]
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section, flags=re.MULTILINE | re.DOTALL)
    # argparse reads % as a format
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}


def documented(cls: type) -> type:
    """A dataclass whose flags are explained by its docstring."""
    texts = setting_texts(cls)
    for item in fields(cls):
        item.metadata = {"help": texts[item.name]}
    return cls


class Checked:
    """Validates every field on construction: by its rule above, or by the choices of its `Literal` type."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, Path):
                value = str(value)
                setattr(self, setting.name, value)
            rule = _RULES.get(setting.name) or _rule_of_type(hints[setting.name])
            if not rule.holds(value):
                raise FocusConfigError(bad_value(setting.name, value, rule.accepted))


def _rule_of_type(hint: Any) -> Rule:
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        return Rule("one of " + ", ".join(map(repr, options)), lambda value: value in options)
    if hint is bool:
        return BOOL
    if list[str] in (hint, *options):
        strings = Rule(
            "a list of strings",
            lambda value: isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value),
        )
        return optional(strings)
    return optional(Rule("a string", lambda value: isinstance(value, str)))
