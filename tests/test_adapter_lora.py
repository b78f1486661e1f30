"""FocusA and LoRA together: in one adapter, and LoRA on a patched model."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import SETTINGS, TINY, logits, make_inputs, randomize
from tiny_adapters import ADAPTER, adapted, layers_of, lora_config, settings
from torch import nn
from transformers import PreTrainedModel

from hf_focus import apply_focus, focus_model_class
from hf_focus.errors import FocusConfigError, FocusError


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


def test_lora_config_of_peft_reloads_on_a_patched_model(tmp_path: Path) -> None:
    both = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["focus"])
    model = randomize(get_peft_model(apply_focus(TINY["llama"].build(), SETTINGS), both)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(apply_focus(TINY["llama"].build(), SETTINGS), tmp_path)
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model, **make_inputs("llama")))


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_default_modules_are_the_plain_model_s(name: str, kind: type[PeftConfig]) -> None:
    """Where no `target_modules` are named, PEFT goes by the model type."""

    def adapted_modules(model: PreTrainedModel) -> set[str]:
        named = get_peft_model(model, kind()).named_modules()
        return {path for path, module in named if isinstance(module, BaseTunerLayer)}

    expected = adapted_modules(TINY[name].build())
    assert expected
    assert adapted_modules(apply_focus(TINY[name].build())) == expected
