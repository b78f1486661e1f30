"""Rules that settings keep: what is accepted, in words, and the check of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """accepted: for the message on a value that is not. holds: whether a value is."""

    accepted: str
    holds: Callable[[Any], bool]


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # NaN fails every comparison of a rule, infinity fails this one
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def int_from(low: int) -> Rule:
    return Rule(f"an int >= {low}", lambda value: is_int(value) and value >= low)


def number(accepted: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(accepted, lambda value: _is_number(value) and holds(value))


def choice(*options: str) -> Rule:
    return Rule("one of " + ", ".join(map(repr, options)), lambda value: isinstance(value, str) and value in options)


def optional(rule: Rule) -> Rule:
    return Rule(f"None or {rule.accepted}", lambda value: value is None or rule.holds(value))


BOOL = Rule("True or False", lambda value: isinstance(value, bool))
NON_NEGATIVE = number("a number >= 0", lambda value: value >= 0)
BELOW_ONE = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
BETWEEN_ZERO_AND_ONE = number("a number strictly between 0 and 1", lambda value: 0 < value < 1)
