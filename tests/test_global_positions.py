"""`global_rotation`: the global branch has a part of the positions or none, the local branch all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import LENGTH, SETTINGS, TINY, decoded, in_one_row, left_padded, logits, patched, tokens
from transformers import (
    AutoModelForCausalLM,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from hf_focus import FocusAdapterConfig, FocusConfig, apply_focus, remove_focus
from hf_focus.branch import FocusBranch
from hf_focus.errors import FocusConfigError
from hf_focus.iteration import rotate
from hf_focus.rotary import BASE, Rotation
from hf_focus.rotation_hooks import RotationHook

STILL = FocusConfig.build(SETTINGS, global_rotation=0)
SHARES = (0.0, 0.3, 0.5)
ROTARY = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "modernbert")


def inputs_of(ids: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("name", ROTARY)
def test_the_global_branch_without_positions(name: str) -> None:
    ids, sizes = tokens(), {"initializer_range": 0.2}
    model = TINY[name].build(**sizes).double()
    expected = logits(model, **inputs_of(ids, position_ids=torch.zeros_like(ids)))
    original = logits(model, **inputs_of(ids))
    assert (original - expected).abs().max() > 1e-3
    # The branch is silent yet: what is left is the global one
    assert torch.equal(logits(apply_focus(model, STILL), **inputs_of(ids)), expected)
    assert torch.equal(logits(remove_focus(model), **inputs_of(ids)), original)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(isinstance(hook, RotationHook) for hook in hooks)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_oss", "cohere", "glm"])
def test_the_global_branch_with_the_fast_pairs(name: str) -> None:
    """As a model whose slow frequencies are 0, in every layout of pairs and angles."""
    prefix = {"gpt_neox": "GPTNeoX", "gpt_oss": "GptOss"}.get(name, name.title())
    small = {}
    if name == "gpt_oss":
        # Its own are scaled, as YaRN has it
        plain = {"rope_type": "default", "rope_theta": 10_000.0}
        small = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": plain}
    sizes = {**TINY["llama"].sizes, "head_dim": 8, "initializer_range": 0.2, **small}
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**sizes)).eval()
    ids = tokens()
    rotary = next(module for path, module in model.named_modules() if path.endswith(("rotary_emb", "rotary")))
    whole = rotary.inv_freq.clone()
    rotary.inv_freq[round(0.5 * len(whole)) :] = 0
    expected = logits(model, **inputs_of(ids))
    rotary.inv_freq.copy_(whole)
    original = logits(model, **inputs_of(ids))
    found = logits(apply_focus(model, FocusConfig.build(STILL, global_rotation=0.5)), **inputs_of(ids))
    assert torch.equal(found, expected)
    assert (original - expected).abs().max() > 1e-3


@given(
    length=st.integers(1, 12),
    more=st.integers(0, 9),
    start=st.integers(0, 50),
    is_causal=st.booleans(),
    qk_norm=st.booleans(),
    share=st.sampled_from(SHARES),
    layout=st.sampled_from(["halves", "neighbours"]),
    seed=st.integers(0, 99),
)
def test_the_local_branch_has_all_positions(
    length: int, more: int, start: int, is_causal: bool, qk_norm: bool, share: float, layout: str, seed: int
) -> None:
    """What was rotated in part gives what a model with base 10,000 rotates would, from any place on."""
    if not is_causal:
        more = 0
    torch.manual_seed(seed)
    config = FocusConfig.build(STILL, global_rotation=share, qk_norm=qk_norm, refiner=False, base_threshold=0.0)
    branch = FocusBranch(config, 4, 10, 8).double().eval()
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, output = torch.randn(2, 4, length, 10).double(), torch.randn(2, length, 4, 8).double()
    key, value = torch.randn(2, 2, length + more, 10).double(), torch.randn(2, 2, length + more, 8).double()
    # Of ten features eight rotate
    angle = (start + torch.arange(length + more))[:, None] * BASE ** -(torch.arange(0, 8, 2).double() / 8)
    both = torch.stack([angle.cos(), angle.sin()])[:, None]
    values = both.repeat(1, 1, 1, 2) if layout == "halves" else both.repeat_interleave(2, dim=-1)
    fast = Rotation(*values, layout).fast(share).values
    rotation = Rotation(*values[:, :, more:], layout)
    options = {"is_causal": is_causal, "query_offset": more, "rotation": rotation}
    found = branch(rotate(query, fast[:, :, more:], layout), rotate(key, fast, layout), value, output, **options)
    branch.config = FocusConfig.build(config, global_rotation=1)
    whole = branch(rotate(query, values[:, :, more:], layout), rotate(key, values, layout), value, output, **options)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"qk_norm": True}, {"max_dist": 9}, {"rotate_feedback": False}, {"global_rotation": 0.5}],
    ids=lambda x: str([*x]),
)
def test_decoding_equals_one_pass(name: str, cache: str, settings: dict[str, Any]) -> None:
    model = patched(name, FocusConfig.build(STILL, **settings), initializer_range=0.2).double()
    ids = tokens()
    expected = logits(model, **inputs_of(ids))
    torch.testing.assert_close(decoded(model, ids, cache), expected, rtol=0, atol=1e-5)


def test_padding_and_places_do_not_matter() -> None:
    model, ids = patched("llama", STILL, initializer_range=0.2).double(), tokens()
    expected = logits(model, **inputs_of(ids))
    found = logits(model, **left_padded(ids))[:, -LENGTH:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    places = torch.arange(LENGTH)[None] + 70
    assert torch.equal(logits(model, **inputs_of(ids, position_ids=places)), expected)
    packed = logits(model, **in_one_row(ids))
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=0, atol=1e-5)


def test_training_and_the_saved_model(tmp_path: Path) -> None:
    # A refiner would move between the two passes
    model, ids = patched("llama", FocusConfig.build(STILL, refiner=False)).train(), tokens()
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.focus_config["global_rotation"] == 0
    assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))


def test_compiled() -> None:
    torch._dynamo.reset()
    model, ids = patched("llama", STILL, num_hidden_layers=1), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=0, atol=1e-6)


def test_layers_that_never_rotate_stay() -> None:
    sizes = {**TINY["llama"].sizes, "no_rope_layers": [1, 0]}
    model = apply_focus(SmolLM3ForCausalLM(SmolLM3Config(**sizes)).eval(), STILL)
    hooks = [list(layer.self_attn._forward_pre_hooks.values()) for layer in model.model.layers]
    assert [len(found) for found in hooks] == [1, 0]
    assert hooks[0][0].share == 0


def test_layers_that_share_keys_are_patched_together() -> None:
    shared = {**TINY["llama"].sizes, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8}
    small = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    config = Gemma3nTextConfig(
        **shared, **small, altup_num_inputs=2, sliding_window=6, activation_sparsity_pattern=None
    )
    model = Gemma3nForCausalLM(config).eval()
    before = logits(model, input_ids=tokens())
    for part in ({"layers": [0, 1]}, {"modules": r"layers\.[0-2]"}):
        with pytest.raises(
            FocusConfigError, match=r"`global_rotation` got 0; accepted: 1.0, or all layers of a model"
        ):
            apply_focus(model, FocusConfig.build(STILL, **part))
    assert torch.equal(logits(model, input_ids=tokens()), before)
    apply_focus(model, STILL)
    assert not torch.equal(logits(model, input_ids=tokens()), before)


def small_dinov3() -> DINOv3ViTModel:
    """Rotates by angles without a batch dimension, and not all of its tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=16, patch_size=4)).eval()


def test_refusals() -> None:
    model = TINY["bert"].build()
    before = logits(model, input_ids=tokens())
    message = r"`global_rotation` got 0; accepted: 1.0: `bert.*BertSelfAttention.* `modules` chooses"
    with pytest.raises(FocusConfigError, match=message):
        apply_focus(model, STILL)
    assert torch.equal(logits(model, input_ids=tokens()), before)
    with pytest.raises(FocusConfigError, match=r"`global_rotation` got 0; accepted: 1.0: an adapter leaves"):
        FocusAdapterConfig(focus_config=STILL)
    vision = apply_focus(small_dinov3(), STILL)
    with pytest.raises(FocusConfigError, match=r"`global_rotation` got 0; accepted: 1.0 for DINOv3ViTAttention"):
        vision(torch.randn(1, 3, 16, 16))
