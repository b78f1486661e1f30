"""Adapters that act, saved and loaded: through PEFT, through transformers and its Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import SETTINGS, TINY, logits, make_inputs, randomize
from tiny_adapters import ADAPTER, ARCHITECTURES, adapted, config, is_equal, is_layer, layers_of, lora_config, weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_focus import FocusAdapterConfig
from hf_focus.architecture import _ARCHITECTURES, Architecture
from hf_focus.errors import UnsupportedArchitectureError


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_starts_as_the_base_and_then_acts(name: str) -> None:
    base = TINY[name].build()
    inputs = make_inputs(name)
    expected, before = logits(base, **inputs), weights(base)
    model = get_peft_model(base, config())
    assert not any(module.training for module in base.modules())
    assert torch.equal(logits(model.eval(), **inputs), expected)
    assert not torch.allclose(logits(randomize(model), **inputs), expected, atol=1e-4)
    assert model.get_base_model() is base
    assert model.targeted_module_names == [
        key.removesuffix(".focus") for key, m in base.named_modules() if is_layer(m)
    ]
    assert is_equal(weights(base), before)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, _ in model.named_parameters() if ".focus." in key}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saves_its_own_tensors_only_and_reloads_bit_equal(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    inputs = make_inputs(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / ADAPTER)
    ours = {key: value for key, value in model.state_dict().items() if ".focus." in key}
    assert {key.replace(".focus_branches.", ".focus_branches.default.") for key in saved} == set(ours)
    assert any(key.endswith("refiner.table") for key in saved)

    base = TINY[name].build()
    before = weights(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert is_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
    assert is_equal(weights(base), before)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_adapter_of_before_is_what_it_was(tmp_path: Path) -> None:
    """Before it was a setting, nothing that was fed back was rotated."""
    model, inputs = adapted("llama"), make_inputs("llama")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    del values["focus_config"]["rotate_feedback"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path).eval()
    assert loaded.peft_config["default"].settings.rotate_feedback is False
    assert not torch.equal(logits(loaded, **inputs), logits(model.eval(), **inputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_through_transformers(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    inputs = make_inputs(name)
    model.save_pretrained(tmp_path)
    base = TINY[name].build()
    before, plain = weights(base), logits(base, **inputs)
    info = base.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(base, **inputs), logits(model, **inputs))
    base.disable_adapters()
    assert torch.equal(logits(base, **inputs), plain)
    base.enable_adapters()
    assert torch.equal(logits(base, **inputs), logits(model, **inputs))
    assert is_equal(weights(base), before)
    base.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(TINY[name].build(), tmp_path / "again")
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))


def test_loaded_to_train_on(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    ours = {key for key, _ in loaded.named_parameters() if ".focus." in key}
    assert any(".second." in key for key in ours)
    assert {key for key, parameter in loaded.named_parameters() if parameter.requires_grad} == ours


def test_loads_with_little_memory(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path, low_cpu_mem_usage=True)
    assert is_equal(loaded.state_dict(), model.state_dict())
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model, **make_inputs("llama")))
    loaded.add_adapter("empty", config(), low_cpu_mem_usage=True)
    layer = layers_of(loaded)[0]
    assert {parameter.device.type for parameter in layer.focus_branches["empty"].parameters()} == {"meta"}
    layer._move_adapter_to_device_of_base_layer("other", torch.device("meta"))
    layer._move_adapter_to_device_of_base_layer("default")
    devices = {name: next(branch.parameters()).device.type for name, branch in layer.focus_branches.items()}
    assert devices == {"default": "cpu", "other": "meta", "empty": "meta"}


AUTO: dict[str, tuple[str, str, str, type, type | None]] = {
    "causal": ("llama", "LlamaForCausalLM", "CAUSAL_LM", AutoPeftModelForCausalLM, AutoModelForCausalLM),
    "seq2seq": ("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM, AutoModelForSeq2SeqLM),
    "classifier": ("bert", "BertForSequenceClassification", "SEQ_CLS", AutoPeftModelForSequenceClassification, None),
}


@pytest.mark.parametrize("task", AUTO)
def test_loads_through_auto_classes(task: str, tmp_path: Path) -> None:
    name, model_class, task_type, auto_peft, auto = AUTO[task]
    TINY[name].build(model_class).save_pretrained(tmp_path / "base")
    base = getattr(__import__("transformers"), model_class).from_pretrained(tmp_path / "base")
    adapter = FocusAdapterConfig(focus_config=SETTINGS, task_type=task_type)
    model = randomize(get_peft_model(base, adapter)).eval()
    if task == "classifier":
        nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    inputs = make_inputs(name)
    expected = logits(model, **inputs)
    heads = [key for key in load_file(tmp_path / "adapter" / ADAPTER) if ".focus." not in key]
    assert len(heads) == (2 if task == "classifier" else 0)
    loaded = auto_peft.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, **inputs), expected)
    if auto is not None:
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter"), **inputs), expected)


def test_brings_the_architecture_it_was_declared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(_ARCHITECTURES, "llama", Architecture("llama", attention="NothingLikeIt"))
    with pytest.raises(UnsupportedArchitectureError):
        get_peft_model(TINY["llama"].build(), config())
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path)
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model, **make_inputs("llama")))


def test_bfloat16_base_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    model = randomize(get_peft_model(TINY["llama"].build().to(torch.bfloat16), config())).eval()
    assert {parameter.dtype for key, parameter in model.named_parameters() if ".focus." in key} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["llama"].build().to(torch.bfloat16), tmp_path)
    expected = logits(model, **make_inputs("llama"))
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, **make_inputs("llama")), expected)
    with pytest.warns(UserWarning, match="cannot be folded"):
        merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.dtype == torch.bfloat16
    assert is_equal(again.state_dict(), merged.state_dict())


@pytest.mark.parametrize("adapter", [config(max_span=5, layers=[1]), lora_config(r=3)])
def test_config_round_trip(adapter: PeftConfig, tmp_path: Path) -> None:
    adapter.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is type(adapter)
    assert loaded.settings == adapter.settings
    assert loaded == adapter
    with open(tmp_path / "adapter_config.json") as file:
        assert json.load(file)["focus_config"] == adapter.settings.to_dict()


def test_a_config_serves_several_models() -> None:
    shared = config()
    for name in ("llama", "bert"):
        get_peft_model(TINY[name].build(), shared)
    assert shared.base_model_type is None
