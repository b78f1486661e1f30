"""FocusA as a PEFT method, alone and with LoRA: everything that PEFT promises of an adapter, and clear errors."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import DECODERS, SETTINGS, TINY, logits, make_inputs, patched, randomize, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import hf_focus
from hf_focus import FocusAdapterConfig, FocusConfig, FocusLoraConfig, apply_focus, focus_model_class
from hf_focus.adapter_layer import AttentionConfig, FocusAdapterLayer
from hf_focus.architecture import _ARCHITECTURES, Architecture
from hf_focus.errors import (
    AlreadyPatchedError,
    FocusCheckpointError,
    FocusConfigError,
    FocusError,
    NoMatchingLayerError,
    UnsupportedArchitectureError,
)

ARCHITECTURES = ["llama", "gemma2", "gpt2", "bert", "t5", "whisper"]
ADAPTER = "adapter_model.safetensors"


def settings(**changes: Any) -> FocusConfig:
    return FocusConfig.build(SETTINGS, **changes)


def config(**changes: Any) -> FocusAdapterConfig:
    return FocusAdapterConfig(focus_config=settings(**changes))


def lora_config(**changes: Any) -> FocusLoraConfig:
    return FocusLoraConfig(**{"r": 2, "target_modules": ["q_proj"], "focus_config": SETTINGS, **changes})


def adapted(name: str, adapter: PeftConfig | None = None) -> PeftModel:
    """A tiny model with an adapter that acts, in eval mode."""
    return randomize(get_peft_model(TINY[name].build(), adapter or config())).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".focus." not in key}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, FocusAdapterLayer)


def layers_of(model: nn.Module) -> list[FocusAdapterLayer]:
    return list(filter(is_layer, model.modules()))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that an adapter might leave a trace on."""
    return {
        path: (type(module), set(vars(module)), set(dict(module.named_children())), vars(module).get("config"))
        for path, module in model.named_modules()
    } | {
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "config": (model.config.to_dict(), model.config._attn_implementation) if hasattr(model, "config") else None,
    }


# Outputs, saving and loading


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


# Off, out, in for good


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disabled_is_the_base(name: str) -> None:
    base = TINY[name].build()
    inputs = make_inputs(name)
    kind, expected = type(base), logits(base, **inputs)
    model = randomize(get_peft_model(base, config())).eval()
    active = logits(model, **inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), expected)
        assert type(base) is kind
    assert torch.equal(logits(model, **inputs), active)


def test_disabled_is_the_base_in_training_too() -> None:
    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        (embedding,) = (p for name, p in model.named_parameters() if name.endswith("embed_tokens.weight"))
        embedding.requires_grad_(True)
        embedding.grad = None
        outputs = model(**make_inputs("llama"), labels=tokens())
        outputs.loss.backward()
        return {"logits": outputs.logits, "gradient": embedding.grad}

    expected = TINY["llama"].build().train()
    expected.gradient_checkpointing_enable()
    model = get_peft_model(TINY["llama"].build(), config()).train()
    randomize(model).gradient_checkpointing_enable()
    with model.disable_adapter():
        assert is_equal(gradients(model), gradients(expected))
    table = next(value for name, value in model.state_dict().items() if name.endswith("num_updates"))
    assert table.item() == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unload_leaves_nothing(name: str) -> None:
    base = TINY[name].build()
    base.requires_grad_(False)
    before, state, expected = snapshot(base), weights(base), logits(base, **make_inputs(name))
    plain = randomize(get_peft_model(base, config())).eval().unload()
    assert plain is base
    assert snapshot(plain) == before
    assert not hasattr(plain, "peft_config")
    assert is_equal(plain.state_dict(), state)
    assert torch.equal(logits(plain, **make_inputs(name)), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merges_into_a_focus_model(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    inputs = make_inputs(name)
    kind, expected = type(model.get_base_model()), logits(model, **inputs)
    with pytest.warns(UserWarning, match=f"cannot be folded .* Focus{kind.__name__}"):
        merged = model.merge_and_unload()
    assert type(merged) is focus_model_class(kind)
    assert merged.focus_config == SETTINGS
    assert not hasattr(merged, "peft_config")
    assert torch.equal(logits(merged, **inputs), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), **inputs), expected)


def test_merges_the_adapter_asked_for() -> None:
    model = adapted("llama", config(layers=[1]))
    model.add_adapter("other", config(max_span=4))
    randomize(model, std=0.2)
    model.set_adapter("other")
    expected = logits(model, **make_inputs("llama"))
    model.set_adapter("default")
    with pytest.raises(FocusConfigError, match=r"`adapter_names` got \['none'\]; accepted: one of 'default', 'other'"):
        model.merge_and_unload(adapter_names=["none"])
    with pytest.warns(UserWarning, match="cannot be folded"):
        merged = model.merge_and_unload(adapter_names=["other"])
    assert merged.focus_config.max_span == 4
    assert torch.equal(logits(merged, **make_inputs("llama")), expected)


def test_a_trained_head_is_merged_too() -> None:
    adapter = FocusAdapterConfig(focus_config=SETTINGS, task_type="SEQ_CLS")
    model = get_peft_model(TINY["roberta"].build("RobertaForSequenceClassification"), adapter)
    head = randomize(model).eval().get_base_model().classifier.modules_to_save["default"]
    nn.init.normal_(head.out_proj.weight)
    expected = logits(model, **make_inputs("roberta"))
    with pytest.warns(UserWarning, match="cannot be folded"):
        merged = model.merge_and_unload()
    assert merged.classifier is head
    assert torch.equal(logits(merged, **make_inputs("roberta")), expected)


def test_merging_in_place_is_refused_and_nan_is_found() -> None:
    model = adapted("llama")
    with pytest.raises(FocusError, match=r"merge_and_unload\(\) gives"):
        model.merge_adapter()
    next(p for name, p in model.named_parameters() if name.endswith("join")).data[0] = float("nan")
    with pytest.raises(FocusConfigError, match=r"`safe_merge` got True; accepted: False.*layers.0.self_attn"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in DECODERS])
def test_generates_with_the_cache_as_without(name: str) -> None:
    model = adapted(name)
    inputs = {key: value[:, :6] if key == "input_ids" else value for key, value in make_inputs(name).items()}
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**inputs, **options))


# Several adapters


def test_adapters_of_other_settings_and_layers_switch(tmp_path: Path) -> None:
    inputs = make_inputs("llama")
    alone = {
        "default": adapted("llama", config(layers=[0])),
        "wide": adapted("llama", config(max_span=12, max_iterations=1, refiner=False)),
    }
    expected = {name: logits(model, **inputs) for name, model in alone.items()}
    model = get_peft_model(TINY["llama"].build(), config(layers=[0])).eval()
    model.add_adapter("wide", config(max_span=12, max_iterations=1, refiner=False))
    for name, other in alone.items():
        state = other.get_base_model().state_dict()
        model.get_base_model().load_state_dict(
            {key.replace(".default.", f".{name}."): value for key, value in state.items()}, strict=False
        )
    for name in ("default", "wide", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model, **inputs), expected[name])
        assert all(f".{name}." in key for key, p in model.named_parameters() if p.requires_grad)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path)
    loaded.load_adapter(tmp_path / "wide", adapter_name="wide")
    assert torch.equal(logits(loaded, **inputs), expected["default"])
    loaded.set_adapter("wide")
    assert torch.equal(logits(loaded, **inputs), expected["wide"])
    assert is_equal(load_file(tmp_path / "wide" / ADAPTER), saved_by(alone["wide"], tmp_path / "alone"))


def saved_by(model: PeftModel, path: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(path)
    return load_file(path / ADAPTER)


def test_deleting_adapters() -> None:
    inputs = make_inputs("llama")
    base = TINY["llama"].build()
    plain = logits(base, **inputs)
    model = get_peft_model(base, config(layers=[0, 1])).eval()
    # After the first is gone, each layer would choose another one by itself
    model.add_adapter("a", config(layers=[0]))
    model.add_adapter("b", config(layers=[1]))
    randomize(model)
    model.set_adapter("a")
    expected = logits(model, **inputs)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model, **inputs), expected)
    model.delete_adapter("b")
    assert torch.equal(logits(model, **inputs), expected)
    assert not any(".b." in key or ".default." in key for key in model.state_dict())
    model.delete_adapter("a")
    assert torch.equal(logits(base, **inputs), plain)
    model.add_adapter("c", config())
    model.set_adapter("c")
    assert not torch.equal(logits(randomize(model), **inputs), plain)


def test_several_adapters_through_transformers(tmp_path: Path) -> None:
    inputs = make_inputs("llama")
    one, other = adapted("llama"), randomize(adapted("llama", config(layers=[1])), std=0.2)
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
    base = TINY["llama"].build()
    plain = logits(base, **inputs)
    base.load_adapter(str(tmp_path / "one"), adapter_name="one")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        base.load_adapter(str(tmp_path / "other"), adapter_name="other")
    assert torch.equal(logits(base, **inputs), logits(other, **inputs))
    with pytest.raises(FocusConfigError, match="one adapter at a time"):
        base.set_adapter(["one", "other"])
    base.set_adapter("one")
    assert torch.equal(logits(base, **inputs), logits(one, **inputs))
    base.delete_adapter("one")
    assert torch.equal(logits(base, **inputs), plain)
    base.delete_adapter("other")
    # The next in line must find a model that it can patch
    apply_focus(base, SETTINGS)
    assert not torch.equal(logits(randomize(base), **inputs), plain)


def test_only_one_adapter_acts() -> None:
    model = adapted("llama")
    model.add_adapter("other", config())
    with pytest.raises(FocusConfigError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    assert all(layer.active_adapters == ["default"] for layer in layers_of(model))


# The live model


def test_other_models_with_the_same_config_are_not_affected() -> None:
    shared = TINY["llama"].build_config()
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(shared).eval(), LlamaForCausalLM(shared).eval()
    inputs = make_inputs("llama")
    before, expected = snapshot(other), logits(other, **inputs)
    model = randomize(get_peft_model(one, config())).eval()
    assert model.get_base_model().config is shared
    assert shared._attn_implementation == "sdpa"
    assert snapshot(other) == before
    assert torch.equal(logits(other, **inputs), expected)


def test_changing_the_attention_changes_the_global_branch_only() -> None:
    model = adapted("llama")
    inputs = make_inputs("llama")
    expected = logits(model, **inputs)
    model.set_attn_implementation("eager")
    assert torch.allclose(logits(model, **inputs), expected, atol=1e-5)
    eager = model(**inputs, output_attentions=True).attentions
    assert all(weight is not None for weight in eager)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, **inputs), expected, atol=1e-4)


def test_copies_and_pickles_are_models_of_their_own() -> None:
    model = adapted("llama")
    inputs = make_inputs("llama")
    expected = logits(model, **inputs)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone, **inputs), expected)
        clone.base_model.disable_adapter_layers()
        assert not torch.equal(logits(clone, **inputs), expected)
        assert torch.equal(logits(model, **inputs), expected)
        assert not hasattr(AttentionConfig.__new__(AttentionConfig), "vocab_size")
        assert layers_of(clone)[0].get_base_layer() is clone.get_base_model().model.layers[0].self_attn


def test_compiles_in_one_graph() -> None:
    model = adapted("llama")
    inputs = make_inputs("llama")
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    active = logits(model, **inputs)
    assert torch.allclose(logits(compiled, **inputs), active, atol=1e-6)
    with model.disable_adapter():
        plain = logits(model, **inputs)
        assert torch.allclose(logits(compiled, **inputs), plain, atol=1e-6)
    assert not torch.allclose(plain, active, atol=1e-4)


# Training


def gradients_of(model: PeftModel, checkpointing: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(0)
    model(**make_inputs("llama"), labels=tokens()).loss.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    return found | {key: value for key, value in model.state_dict().items() if ".refiner." in key}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_and_updates_the_refiner_once(use_reentrant: bool) -> None:
    # Exploration would meet other random numbers
    quiet = config(epsilon=0)
    expected = gradients_of(adapted("llama", quiet), None)
    found = gradients_of(adapted("llama", quiet), {"use_reentrant": use_reentrant})
    assert {key for key, value in found.items() if key.endswith("num_updates") and value.item() != 1} == set()
    for key, value in expected.items():
        assert value is not None, key
        assert torch.allclose(found[key], value, atol=1e-6), key
    assert all(value.any() for key, value in found.items() if not key.endswith("table"))


def test_trainer_saves_the_adapter_only(tmp_path: Path) -> None:
    base = TINY["llama"].build()
    before = weights(base)
    model = get_peft_model(base, config())
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert (folder / ADAPTER).exists()
        assert not (folder / "model.safetensors").exists()
        assert all(".focus." in key for key in load_file(folder / ADAPTER))
    assert is_equal(weights(base), before)
    saved = load_file(tmp_path / "final" / ADAPTER)
    # In the first step the local output is silent: nothing depends on it, and it teaches nothing
    assert {saved[key].item() for key in saved if key.endswith("num_updates")} == {2}
    assert all(saved[key].any() for key in saved if key.endswith("join"))
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path / "final")
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model.eval(), **make_inputs("llama")))

    again = get_peft_model(TINY["llama"].build(), config())
    resumed = Trainer(model=again, args=arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(value.item() == 2 for key, value in again.state_dict().items() if key.endswith("num_updates"))


def test_counts_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("llama")
    ours = sum(parameter.numel() for key, parameter in model.named_parameters() if ".focus." in key)
    model.print_trainable_parameters()
    assert f"trainable params: {ours:,}" in capsys.readouterr().out


def test_is_at_most_a_hundredth_of_a_one_billion_llama() -> None:
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    base.tie_weights()
    size = base.num_parameters()
    assert 1.2e9 < size < 1.3e9
    trainable, total = get_peft_model(base, FocusAdapterConfig()).get_nb_trainable_parameters()
    assert total == size + trainable
    assert 0 < trainable <= 0.01 * size


# With LoRA


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_lora_and_focus_in_one_folder(name: str, tmp_path: Path) -> None:
    base = TINY[name].build()
    inputs = make_inputs(name)
    plain = logits(base, **inputs)
    model = randomize(get_peft_model(base, lora_config(target_modules="all-linear"))).eval()
    untrained = get_peft_model(TINY[name].build(), lora_config(target_modules="all-linear")).eval()
    assert torch.equal(logits(untrained, **inputs), plain)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    assert not any("lora_" in key and ".focus." in key for key in model.state_dict())
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / ADAPTER)
    assert all((".focus." in key) != (".lora_" in key) for key in saved)
    assert {key.partition("refiner.")[2] for key in saved if "refiner." in key} == {
        "table",
        "mean",
        "variance",
        "num_updates",
    }

    loaded = PeftModel.from_pretrained(TINY[name].build(), tmp_path)
    assert torch.equal(logits(loaded, **inputs), expected)
    through = TINY[name].build()
    info = through.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(through, **inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), plain)
    with pytest.warns(UserWarning, match="cannot be folded"):
        merged = model.merge_and_unload()
    assert type(merged) is focus_model_class(type(TINY[name].build()))
    assert torch.allclose(logits(merged, **inputs), expected, atol=1e-4)
    assert not any("lora_" in key for key in merged.state_dict())
    assert torch.equal(logits(loaded.unload(), **inputs), plain)


def test_lora_and_focus_switch_and_train_together() -> None:
    inputs = make_inputs("llama")
    model = adapted("llama", lora_config())
    expected = logits(model, **inputs)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {".focus." in key for key in trained} == {True, False}
    assert all(".focus." in key or ".lora_" in key for key in trained)
    model.add_adapter("other", lora_config(focus_config=settings(max_span=4, layers=[1])))
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained
    randomize(layers_of(model)[1].focus_branches["other"])
    model.set_adapter("other")
    assert not torch.equal(logits(model, **inputs), expected)
    with pytest.raises(FocusError, match="cannot"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    with pytest.raises(FocusConfigError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "other"])
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)} == {("other",)}
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, **inputs), expected)


def test_a_reader_needs_hf_focus_and_no_other_import(tmp_path: Path) -> None:
    adapted("llama", lora_config()).save_pretrained(tmp_path / "lora")
    adapted("llama").save_pretrained(tmp_path / "alone")
    TINY["llama"].build().save_pretrained(tmp_path / "base")
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "def load(folder):\n"
        "    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    return type(PeftModel.from_pretrained(base, folder).base_model).__name__\n"
        "for folder in sys.argv[2:]:\n"
        "    try: print(load(folder))\n"
        "    except KeyError as error: print(error)\n"
        "import hf_focus\n"
        "print(*map(load, sys.argv[2:]))\n"
    )
    lines = run(script, tmp_path / "base", tmp_path / "lora", tmp_path / "alone").split()
    assert lines == ["'FOCUS_LORA'", "'FOCUS'", "FocusLoraModel", "FocusAdapterModel"]


def run(script: str, *arguments: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peft_is_optional() -> None:
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "import hf_focus; hf_focus.FocusConfig()\n"
        "try: hf_focus.FocusAdapterConfig\n"
        "except ImportError as error: print(error)\n"
        "try: hf_focus.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    lines = run(script).splitlines()
    assert "peft" in lines[0]
    assert lines[1] == "module 'hf_focus' has no attribute 'nothing'"


# Bad input


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


def test_lora_config_of_peft_reloads_on_a_patched_model(tmp_path: Path) -> None:
    both = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["focus"])
    model = randomize(get_peft_model(apply_focus(TINY["llama"].build(), SETTINGS), both)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(apply_focus(TINY["llama"].build(), SETTINGS), tmp_path)
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model, **make_inputs("llama")))


def test_names_are_public() -> None:
    for name in ("FocusAdapterConfig", "FocusAdapterModel", "FocusLoraConfig", "FocusLoraModel"):
        assert getattr(hf_focus, name).__name__ == name
