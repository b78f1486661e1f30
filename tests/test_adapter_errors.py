"""Adapters that do not fit are refused, and what fails leaves the model as it was."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TINY, logits, make_inputs, patched, randomize
from tiny_adapters import ADAPTER, adapted, config, is_equal, lora_config, snapshot
from torch import nn
from transformers import PreTrainedModel

from hf_focus import FocusAdapterConfig, FocusLoraConfig
from hf_focus.errors import (
    AlreadyPatchedError,
    FocusCheckpointError,
    FocusConfigError,
    FocusError,
    NoMatchingLayerError,
)


def saved(path: Path, name: str = "llama", adapter: PeftConfig | None = None, **sizes: Any) -> Path:
    get_peft_model(TINY[name].build(**sizes), adapter or config()).save_pretrained(path)
    return path


LOADED: dict[str, tuple[str, dict[str, Any], type[FocusError], str]] = {
    "another architecture": (
        "gpt2",
        {},
        FocusCheckpointError,
        "`model` got 'GPT2LMHeadModel of type gpt2'; accepted: a model of type 'llama'",
    ),
    "other sizes": (
        "llama",
        {"num_attention_heads": 2},
        FocusCheckpointError,
        "`model.layers.0.self_attn` got 'num_heads=2 head_dim=16 .*'; accepted: 'num_heads=4 head_dim=8",
    ),
    "fewer layers": (
        "llama",
        {"num_hidden_layers": 1},
        FocusCheckpointError,
        "`model.layers.1.self_attn` got 'no such layer'",
    ),
}


@pytest.mark.parametrize("through", ["peft", "transformers"])
@pytest.mark.parametrize("case", LOADED)
def test_an_adapter_for_another_model_is_refused(case: str, through: str, tmp_path: Path) -> None:
    name, sizes, error, message = LOADED[case]
    folder = saved(tmp_path / "adapter")
    base = TINY[name].build(**sizes)
    before = snapshot(base)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, folder) if through == "peft" else base.load_adapter(str(folder))
    assert snapshot(base) == before


ADDED: dict[str, tuple[Callable[[], nn.Module], Callable[[], PeftConfig], type[Exception], str]] = {
    "layers that do not exist": (TINY["llama"].build, lambda: config(layers=[5]), NoMatchingLayerError, r"\[5\]"),
    "a mean over the future": (
        TINY["llama"].build,
        lambda: config(span_granularity="window"),
        FocusConfigError,
        "`span_granularity` got 'window'",
    ),
    "an attention the model does not run on": (
        TINY["llama"].build,
        lambda: config(global_attn_implementation="eager"),
        FocusConfigError,
        "`global_attn_implementation` got 'eager'; accepted: None or 'sdpa'",
    ),
    "an attention FocusA cannot wrap": (
        lambda: TINY["llama"].build(attn_implementation="flex_attention"),
        config,
        FocusConfigError,
        "`attn_implementation` got 'flex_attention'",
    ),
    "no transformers model": (lambda: nn.Linear(2, 2), config, FocusConfigError, "`model` got 'Linear'"),
    "a patched model": (lambda: patched("llama"), config, AlreadyPatchedError, "remove_focus"),
    "lora on a patched model": (lambda: patched("llama"), lora_config, AlreadyPatchedError, "remove_focus"),
    "lora without a target": (
        TINY["llama"].build,
        lambda: lora_config(target_modules=["nothing"]),
        ValueError,
        "nothing",
    ),
}


@pytest.mark.parametrize("case", ADDED)
def test_refuses_before_anything_is_changed(case: str) -> None:
    build, adapter, error, message = ADDED[case]
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, adapter())
    assert snapshot(model) == before
    if isinstance(model, PreTrainedModel):
        with pytest.raises(error, match=message):
            model.add_adapter(adapter(), "default")
        assert snapshot(model) == before


def fail(*args: Any, **kwargs: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("adapter", [config(), lora_config(target_modules="all-linear")], ids=["alone", "lora"])
def test_failing_to_build_leaves_nothing(adapter: PeftConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    base = TINY["llama"].build()
    before = snapshot(base)
    monkeypatch.setattr("hf_focus.adapter_model.build_branches", fail)
    with pytest.raises(MemoryError):
        get_peft_model(base, adapter)
    assert snapshot(base) == before


@pytest.mark.parametrize("through", ["peft", "transformers"])
def test_a_second_adapter_that_fails_leaves_the_first(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("llama")
    model = adapted("llama") if through == "peft" else TINY["llama"].build()
    if through == "transformers":
        model.add_adapter(config(), "default")
        randomize(model).eval()
    before, state, expected = snapshot(model), dict(model.state_dict()), logits(model, **inputs)

    def add(**changes: Any) -> None:
        arguments = ("other", config(**changes)) if through == "peft" else (config(**changes), "other")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model.add_adapter(*arguments)

    with pytest.raises(NoMatchingLayerError):
        add(layers=[9])
    # The last thing that PEFT does
    monkeypatch.setattr("peft.tuners.tuners_utils.set_additional_trainable_modules", fail)
    with pytest.raises(MemoryError):
        add()
    assert list(model.peft_config) == ["default"]
    assert is_equal(model.state_dict(), state)
    assert torch.equal(logits(model, **inputs), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["span", "layers", "1", "keys", "a.b"])
def test_refuses_adapter_names_that_would_lose_weights(name: str) -> None:
    base = TINY["llama"].build()
    before = snapshot(base)
    with pytest.raises(FocusConfigError, match=re.escape(f"`adapter_name` got '{name}'")):
        get_peft_model(base, config(), adapter_name=name)
    assert snapshot(base) == before


SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "out of range": ({"focus_config": {"max_span": 0}}, "`max_span` got 0; accepted: an int >= 1"),
    "unknown setting": ({"focus_config": {"span": 8}}, "got 'span'; accepted: .*max_span"),
    "no settings": ({"focus_config": 3}, "`config` got 3"),
    "a loss of its own": ({"focus_config": {"span_penalty": 0.1}}, "`span_penalty` got 0.1; accepted: 0"),
    "unknown task": ({"task_type": "POETRY"}, "`task_type` got 'POETRY'; accepted: None, .*CAUSAL_LM"),
    "no architecture": ({"base_model_type": "llama", "focus_architecture": {"a": 1}}, "`focus_architecture` got"),
}


@pytest.mark.parametrize("kind", [FocusAdapterConfig, FocusLoraConfig])
@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_config_refuses(case: str, kind: type[PeftConfig]) -> None:
    values, message = SETTINGS_REFUSED[case]
    with pytest.raises(FocusConfigError, match=message):
        kind(**values)


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "lack": lambda state, key: state.pop(key),
    "also hold": lambda state, key: state.update({key + "s": state[key].clone()}),
    "misshape": lambda state, key: state.update({key: state[key][:1].clone()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state = load_file(folder / ADAPTER)
    DAMAGES[damage](state, next(key for key in state if key.endswith("layers.1.self_attn.focus.focus_branches.join")))
    save_file(state, folder / ADAPTER, metadata={"format": "pt"})
    base = TINY["llama"].build()
    expected = logits(base, **make_inputs("llama"))
    with pytest.raises(FocusCheckpointError, match=f"weights that {damage} .*join"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(base, **make_inputs("llama")), expected)
