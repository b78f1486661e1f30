"""Rotary positions: with them a patched layer knows distances between tokens, and not their places in the text."""

import json
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny import CAUSAL_LMS, ENCODERS, LENGTH, SETTINGS, TINY, logits, patched, randomize, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_focus import FocusAdapterConfig, FocusConfig, apply_focus, remove_focus
from hf_focus.architecture import Architecture
from hf_focus.branch import FocusBranch
from hf_focus.errors import FocusCheckpointError, UnsupportedArchitectureError
from hf_focus.iteration import rotate, rotate_back
from hf_focus.rotary import Rotation, find_layout
from hf_focus.rotation_hooks import CONDITIONAL, RotationHook, find_rotation
from hf_focus.routing import routed_class, unrouted_class
from hf_focus.sites import plan

# Model types with each of the ways to lay out pairs and angles, and to rotate a part of a head
LAYOUTS = {
    "llama": ("halves", "each"),
    "gpt_neox": ("halves", "each"),
    "gemma4": ("halves", "each"),
    "gpt_oss": ("halves", "once"),
    "cohere": ("neighbours", "each"),
    "glm": ("neighbours", "twice"),
    "helium": ("neighbours", "twice"),
}
ROTARY = {name for name in CAUSAL_LMS + ENCODERS if name not in ("gpt2", "opt", "bert", "roberta", "distilbert")}
FAR = 500
NO_ANGLES = ("position_embeddings is not None", "self.rotary_emb is not None", "rotary_pos_emb is not None")


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_rotation_is_the_models_own(model_type: str) -> None:
    function = import_module(f"transformers.models.{model_type}.modeling_{model_type}").apply_rotary_pos_emb
    assert find_layout(function) == LAYOUTS[model_type]
    query, angle = torch.randn(2, 3, 5, 12), torch.rand(2, 5, 4)
    if model_type != "gpt_oss":
        angle = angle.repeat_interleave(2, dim=-1) if model_type == "cohere" else angle.repeat(1, 1, 2)
    rotation = Rotation(angle.cos(), angle.sin(), *LAYOUTS[model_type])
    rows = (query[..., :8],) if model_type == "gemma4" else (query[..., :8],) * 2
    own = function(*rows, angle.cos(), angle.sin())
    own = own if model_type == "gemma4" else own[0]
    rotated = rotate(query, rotation.values, rotation.pairs)
    # Features beyond the rotated ones stay
    torch.testing.assert_close(rotated, torch.cat([own, query[..., 8:]], dim=-1))
    torch.testing.assert_close(rotate_back(rotated, rotation.values, rotation.pairs), query)


def test_another_function_is_no_rotation() -> None:
    assert find_layout(lambda query, key, cos, sin: (query * cos, key * cos)) is None
    assert find_layout(lambda query, key: (query, key)) is None
    assert find_layout(lambda query, key, cos, sin: query.nothing) is None
    assert find_layout(lambda query, key, cos, sin: None) is None
    assert find_layout(print) is None


def near_and_far(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the same text at the start, and `FAR` tokens on."""
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    near, far = (logits(model, **inputs, position_ids=torch.arange(LENGTH)[None] + start) for start in (0, FAR))
    return near, far


@pytest.mark.parametrize("through", ["features", "layer"])
@pytest.mark.parametrize("name", sorted(ROTARY))
def test_the_place_in_the_text_does_not_matter(name: str, through: str) -> None:
    if through == "layer" and name in ("phi3", "gpt_neox", "modernbert"):
        pytest.skip("its projections are fused")
    settings = FocusConfig.build(SETTINGS, feedback_through=through, base_threshold=0.0)
    model = patched(name, settings, max_position_embeddings=2 * FAR, initializer_range=0.2).double()
    near, far = near_and_far(model)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
    for module in model.modules():
        if isinstance(module, FocusBranch):
            module.config = FocusConfig.build(settings, rotate_feedback=False)
    near, far = near_and_far(model)
    assert (near - far).abs().max() > 1e-2


def hooks(model: nn.Module) -> list[RotationHook]:
    found = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in found if isinstance(hook, RotationHook)]


def test_copies_have_the_hook_and_removal_takes_it_off() -> None:
    model = apply_focus(TINY["llama"].build(), SETTINGS)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks(copied) == hooks(model)
        assert len(hooks(copied)) == 2
    remove_focus(model)
    assert not hooks(model)
    assert all(not module._forward_pre_hooks_with_kwargs for module in model.modules())


def test_layers_without_a_known_rotation_have_none() -> None:
    assert not hooks(apply_focus(TINY["bert"].build(), SETTINGS))
    assert len(hooks(apply_focus(TINY["llama"].build(), FocusConfig.build(SETTINGS, layers=[1])))) == 1


NO_ROPE = {
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "cohere2": ("Cohere2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}),
    "exaone4": ("Exaone4", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}),
}


@pytest.mark.parametrize("name", NO_ROPE)
def test_layers_without_positions_among_those_with_them(name: str) -> None:
    prefix, changes = NO_ROPE[name]
    sizes = {**TINY["llama"].sizes, **changes, "max_position_embeddings": 2 * FAR, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**sizes))
    randomize(apply_focus(model.eval(), FocusConfig.build(SETTINGS, base_threshold=0.0))).double()
    assert len(hooks(model)) == 1
    near, far = near_and_far(model)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


def saved_with(folder: Path, name: str, **rotary: Any) -> Path:
    """The folder, as if what its layers rotate had been found to be `rotary`; without it: not saved."""
    values = json.loads((folder / name).read_text())
    values["focus_architecture"].pop("rotary", None)
    values["focus_architecture"] |= rotary
    (folder / name).write_text(json.dumps(values))
    return folder


def test_how_layers_rotate_is_saved_and_checked(tmp_path: Path) -> None:
    model = patched("llama")
    model.save_pretrained(tmp_path)
    assert model.config.focus_architecture["rotary"] == {"LlamaAttention": "halves"}
    load = AutoModelForCausalLM.from_pretrained
    # Of an earlier format
    assert len(hooks(load(saved_with(tmp_path, "config.json")))) == 2
    # Made by a release that did not know how they rotate
    silent = load(saved_with(tmp_path, "config.json", rotary={}))
    assert not hooks(silent)
    unrotated = patched("llama", FocusConfig.build(SETTINGS, rotate_feedback=False))
    assert torch.equal(logits(silent, input_ids=tokens()), logits(unrotated, input_ids=tokens()))
    saved_with(tmp_path, "config.json", rotary={"LlamaAttention": "neighbours"})
    message = r"`rotary\['LlamaAttention'\]` got 'neighbours'; accepted: 'halves', which is how"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        load(tmp_path)
    for wrong in ("halves", {"LlamaAttention": ["halves"]}):
        saved_with(tmp_path, "config.json", rotary=wrong)
        with pytest.raises(FocusCheckpointError, match=r"`rotary` got .*; accepted: None or a dict of class names"):
            load(tmp_path)


def test_an_adapter_saves_how_layers_rotate(tmp_path: Path) -> None:
    base = TINY["llama"].build()
    adapted = get_peft_model(base, FocusAdapterConfig(focus_config=SETTINGS, task_type="CAUSAL_LM"))
    assert len(hooks(adapted)) == 2
    adapted.save_pretrained(tmp_path)
    saved_with(tmp_path, "adapter_config.json", rotary={})
    assert not hooks(PeftModel.from_pretrained(TINY["llama"].build(), tmp_path))
    saved_with(tmp_path, "adapter_config.json", rotary={"LlamaAttention": "neighbours"})
    plain = TINY["llama"].build()
    with pytest.raises(UnsupportedArchitectureError, match="got 'neighbours'"):
        PeftModel.from_pretrained(plain, tmp_path)
    assert not hooks(plain)


def test_adapters_of_one_model_rotate_each_as_they_were_saved(tmp_path: Path) -> None:
    adapted = get_peft_model(TINY["llama"].build(), FocusAdapterConfig(focus_config=SETTINGS, task_type="CAUSAL_LM"))
    randomize(adapted)
    for name, rotary in (("then", {}), ("now", {"LlamaAttention": "halves"})):
        adapted.save_pretrained(tmp_path / name)
        saved_with(tmp_path / name, "adapter_config.json", rotary=rotary)
    alone = {
        name: logits(PeftModel.from_pretrained(TINY["llama"].build(), tmp_path / name).eval(), input_ids=tokens())
        for name in ("then", "now")
    }
    assert not torch.equal(alone["then"], alone["now"])
    for names in (("then", "now"), ("now", "then")):
        both = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path / names[0], adapter_name=f"{names[0]}_1")
        both.load_adapter(tmp_path / names[1], adapter_name=f"{names[1]}_1")
        for name in names:
            both.set_adapter(f"{name}_1")
            assert torch.equal(logits(both.eval(), input_ids=tokens()), alone[name])
        merged = both.merge_and_unload()
        assert torch.equal(logits(merged, input_ids=tokens()), alone[names[1]])


def test_a_part_says_how_it_rotates_before_the_whole() -> None:
    model = TINY["llama"].build()
    part = Architecture("llama", ("LlamaAttention",), rotary={})
    whole = Architecture("whole", (), parts=(part,), rotary={"LlamaAttention": "halves"})
    assert all(site.rotation_hook is None for site in plan(model, SETTINGS, whole))
    found = plan(model, SETTINGS, replace(whole, parts=(replace(part, rotary=None),)))
    assert all(site.rotation_hook is not None for site in found)
    assert hash(part) == hash(replace(part, rotary=None))


def test_what_is_not_rotated_needs_no_rotation() -> None:
    wrong = Architecture("llama", ("LlamaAttention",), rotary={"LlamaAttention": "neighbours"})
    for settings in ({"rotate_feedback": False}, {"max_iterations": 1}):
        config = FocusConfig.build(SETTINGS, **settings)
        assert all(site.rotation_hook is None for site in plan(TINY["llama"].build(), config, wrong))
        assert not hooks(apply_focus(TINY["llama"].build(), config))


def test_attention_that_is_not_known_is_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        module = LlamaAttention(TINY["llama"].build_config(), 0)
        latent = DeepseekV3Attention(transformers.DeepseekV3Config(), 0)
    assert find_rotation(latent) == (None, None)
    assert find_rotation(module)[0] == "halves"
    watched = routed_class(LlamaAttention)
    with torch.device("meta"):
        assert find_rotation(watched(TINY["llama"].build_config(), 0), unrouted_class(watched))[0] == "halves"
    # A class of a name that is in the table, without what it is asked for
    monkeypatch.setitem(CONDITIONAL, "LlamaAttention", lambda module: module.nothing_of_the_kind)
    assert find_rotation(module) == (None, None)


def test_attention_that_rotates_on_a_condition_is_known() -> None:
    """Read from the code of the installed transformers: `if …:`, and the rotation within three lines of it."""
    condition = re.compile(
        r"^class (\w+)\b|^ +if ([^\n]+):\n(?:[^\n]*\n){0,2}? +\w+, \w+ = apply_rotary_pos_emb\(",
        re.MULTILINE,
    )
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        code, current = path.read_text(encoding="utf-8"), ""
        for match in condition.finditer(code) if "apply_rotary_pos_emb(" in code else ():
            current = match[1] or current
            # Without angles there is no rotation to hand on; FocusA does not go on cross-attention
            if match[2] not in (None, *NO_ANGLES, "not is_cross_attention"):
                found.add(current)
    assert "SmolLM3Attention" in found
    assert found <= CONDITIONAL.keys()
