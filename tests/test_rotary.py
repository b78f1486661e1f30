"""Rotary positions: with them a patched layer knows distances between tokens, and not their places in the text."""

import pickle
import re
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from tiny import CAUSAL_LMS, ENCODERS, LENGTH, SETTINGS, TINY, logits, patched, tokens
from torch import nn

from hf_focus import FocusConfig, apply_focus, remove_focus
from hf_focus.branch import FocusBranch
from hf_focus.iteration import rotate, rotate_back
from hf_focus.rotary import CONDITIONAL, Rotation, RotationHook, find_layout

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


@pytest.mark.parametrize("through", ["features", "layer"])
@pytest.mark.parametrize("name", sorted(ROTARY))
def test_the_place_in_the_text_does_not_matter(name: str, through: str) -> None:
    if through == "layer" and name in ("phi3", "gpt_neox", "modernbert"):
        pytest.skip("its projections are fused")
    settings = FocusConfig.build(SETTINGS, feedback_through=through, base_threshold=0.0)
    model = patched(name, settings, max_position_embeddings=2 * FAR, initializer_range=0.2).double()
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    near, far = (logits(model, **inputs, position_ids=torch.arange(LENGTH)[None] + start) for start in (0, FAR))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
    for module in model.modules():
        if isinstance(module, FocusBranch):
            module.config = FocusConfig.build(settings, rotate_feedback=False)
    near, far = (logits(model, **inputs, position_ids=torch.arange(LENGTH)[None] + start) for start in (0, FAR))
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
    assert found <= CONDITIONAL
