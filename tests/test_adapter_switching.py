"""Several adapters on a model, and what else happens to a live one: copies, pickles, compiling."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import SETTINGS, TINY, logits, make_inputs, randomize
from tiny_adapters import ADAPTER, adapted, config, is_equal, layers_of, snapshot
from transformers import LlamaForCausalLM

from hf_focus import apply_focus
from hf_focus.adapter_layer import AttentionConfig
from hf_focus.errors import FocusConfigError

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
