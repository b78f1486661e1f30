"""`FocusConfig`: every setting is checked when it is made, and survives JSON."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from hf_focus import FocusConfig
from hf_focus.errors import FocusConfigError, FocusError

POSITIVE_INT = ([1, 7], [0, -1, 2.0, "3", None, True, float("nan")])
FRACTION = ([0, 0.5, 1], [-0.1, 1.1, "0.5", None, False, float("nan"), float("inf")])
BELOW_ONE = ([0, 0.5], [-0.1, 1, "0.5", None, True, float("nan")])
NON_NEGATIVE = ([0, 0.5, 30], [-0.1, "1", None, True, float("nan"), float("inf")])
FLAG = ([True, False], [0, 1, None, "True", 0.5])

# Of each setting: values that it takes, and values that it does not
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_span": POSITIVE_INT,
    "max_iterations": POSITIVE_INT,
    "max_dist": ([None, 1, 512], [0, -1, 2.0, "3", True]),
    "sink_tokens": ([0, 4], [-1, 2.0, "3", None, True]),
    "layers": ([None, [0], [3, 1]], [[], [0, 0], [-1], [1.0], [True], ["0"], 1, "0", {0}, {0: 1}]),
    "modules": ([None, "vision", r"^model\.layers"], ["", "(", 1, ["vision"], True]),
    "ramp": POSITIVE_INT,
    "per_head_span": FLAG,
    "span_granularity": (["token", "window", "sequence"], ["Token", "", None, 1, True, ["token"]]),
    "window_size": POSITIVE_INT,
    "initial_span": ([0.01, 0.99], [0, 1, -0.5, 1.5, "0.5", None, float("nan")]),
    "span_penalty": NON_NEGATIVE,
    "qk_norm": FLAG,
    "temperature": (["learned", "seed"], ["none", "", None, 1.0, True]),
    "exponent_start": ([0, 1, -0.5], ["1", None, True, float("nan")]),
    "sharpen": FLAG,
    "temp_scale": NON_NEGATIVE,
    "feedback": (["normalized", "additive"], ["none", "", None, 1, True]),
    "feedback_through": (["features", "layer", "keys"], ["query", "", None]),
    "rotate_feedback": FLAG,
    "global_rotation": FRACTION,
    "global_exponent_start": ([None, 0, 1, -0.5], ["1", True, float("nan")]),
    "anchored": FLAG,
    "mix_start": ([0.1, 0.9], [0, 1, "0.5", None, True, float("nan")]),
    "gain_start": ([0.1, 1, 3], [0, -1, "1", None, True, float("inf")]),
    "readout": (["mixture", "last"], ["first", "", None, 1, True]),
    "readout_bias": ([-3, 0, 2.5], ["1", None, True, float("nan"), float("inf")]),
    "readout_from": (["query", "both"], ["global", None, True]),
    "local_start": ([0, 1, 0.5], ["1", None, True, float("nan")]),
    "combine": (["per_head", "projection"], ["sum", "", None, 1, True]),
    "stop": (["absolute", "relative"], ["never", "", None, 1, True]),
    "base_threshold": NON_NEGATIVE,
    "threshold_scale": BELOW_ONE,
    "refiner": FLAG,
    "reward": (["seed", "mass", "loss"], ["none", "", None, 1, True]),
    "span_cost": ([0.0, 0.1, 3], [-0.1, float("nan"), float("inf"), "0", None]),
    "num_actions": ([2, 10], [1, 0, -1, 10.0, "10", None, True]),
    "alpha": FRACTION,
    "gamma": BELOW_ONE,
    "epsilon": FRACTION,
    "entropy_weight": NON_NEGATIVE,
    "coverage_threshold": FRACTION,
    "global_attn_implementation": ([None, "sdpa", "eager"], ["focus", "", 1, True]),
    "backend": (["auto", "reference", "blocked", "triton"], ["fast", "", None, 1, True]),
}
ACCEPTED = [(name, value) for name, (accepted, _) in VALUES.items() for value in accepted]
REJECTED = [(name, value) for name, (_, rejected) in VALUES.items() for value in rejected]


def test_every_setting_is_tested() -> None:
    assert list(VALUES) == [field.name for field in dataclasses.fields(FocusConfig)]


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_accepted(name: str, value: Any) -> None:
    config = FocusConfig(**{name: value})
    assert getattr(config, name) == value
    assert FocusConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    others = {key: setting for key, setting in config.to_dict().items() if key != name}
    defaults = FocusConfig().to_dict()
    assert others == {key: defaults[key] for key in others}


@pytest.mark.parametrize(("name", "value"), REJECTED)
def test_rejected(name: str, value: Any) -> None:
    with pytest.raises(FocusConfigError) as error:
        FocusConfig(**{name: value})
    assert str(error.value).startswith(f"`{name}` got {value!r}; accepted: ")
    assert len(str(error.value)) > len(f"`{name}` got {value!r}; accepted: .")
    assert isinstance(error.value, FocusError)
    assert isinstance(error.value, ValueError)
    for make in (FocusConfig.from_dict, FocusConfig.build):
        with pytest.raises(FocusConfigError):
            make({name: value})


@pytest.mark.parametrize("name", VALUES)
def test_immutable(name: str) -> None:
    config = FocusConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(config, name)


def test_the_callers_list_is_copied() -> None:
    layers = [0, 1]
    config = FocusConfig(layers=layers)
    layers.append(-5)
    assert config.layers == [0, 1]
    config.to_dict()["layers"].append(-5)
    assert config.layers == [0, 1]


@pytest.mark.parametrize("layers", [(0, 2), range(0, 4, 2), [0, 2]])
def test_layers_may_be_any_sequence(layers: Any) -> None:
    assert FocusConfig(layers=layers).layers == [0, 2]


def test_copies_are_equal() -> None:
    config = FocusConfig(max_span=17, layers=[1, 0], max_dist=9)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), FocusConfig.build(config)):
        assert twin == config
    assert config != FocusConfig(max_span=17, layers=[0, 1], max_dist=9)


def test_build_overrides() -> None:
    config = FocusConfig(max_span=17, ramp=3)
    expected = FocusConfig(max_span=17, ramp=5)
    assert FocusConfig.build(config, ramp=5) == expected
    assert FocusConfig.build({"max_span": 17}, ramp=5) == expected
    assert FocusConfig.build(None, max_span=17, ramp=5) == expected
    assert FocusConfig.build() == FocusConfig()
    assert config.ramp == 3


def test_unknown_names() -> None:
    for make in (
        lambda: FocusConfig.from_dict({"max_spam": 3}),
        lambda: FocusConfig.build({"max_spam": 3}),
        lambda: FocusConfig.build(FocusConfig(), max_spam=3),
    ):
        with pytest.raises(FocusConfigError, match="'max_spam'; accepted: the settings max_span, max_iterations"):
            make()
    with pytest.raises(TypeError):
        FocusConfig(max_spam=3)


@pytest.mark.parametrize("value", [3, "max_span", [("max_span", 3)], None])
def test_from_dict_wants_a_dict(value: Any) -> None:
    with pytest.raises(FocusConfigError, match="accepted: a FocusConfig or a dict"):
        FocusConfig.from_dict(value)


@pytest.mark.parametrize("value", [3, "max_span", [("max_span", 3)], False])
def test_build_wants_a_config(value: Any) -> None:
    with pytest.raises(FocusConfigError, match="accepted: a FocusConfig, a dict"):
        FocusConfig.build(value)
