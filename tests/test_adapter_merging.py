"""Adapters that are off, taken out, or merged for good."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import DECODERS, SETTINGS, TINY, logits, make_inputs, randomize, tokens
from tiny_adapters import ARCHITECTURES, adapted, config, is_equal, snapshot, weights
from torch import nn
from transformers import BridgeTowerConfig, BridgeTowerModel

from hf_focus import FocusAdapterConfig, focus_model_class
from hf_focus.errors import FocusConfigError, FocusError


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


def test_an_adapter_sees_what_a_patch_would_where_a_model_says_nothing_of_causality() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**sizes, "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 64}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    base = BridgeTowerModel(BridgeTowerConfig(**sizes, text_config=text, vision_config=vision))
    model = get_peft_model(base, config()).eval()
    for name, parameter in model.named_parameters():
        if ".focus." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens(1), "pixel_values": pixels}
    with torch.no_grad():
        expected = model(**inputs).text_features
        assert torch.equal(model.merge_and_unload()(**inputs).text_features, expected)
