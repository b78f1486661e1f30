"""`rotate_global=False`: the global branch has no positions, the local branch has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LENGTH, PAD, SETTINGS, TINY, logits, patched, tokens
from transformers import AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM, StaticCache

from hf_focus import FocusAdapterConfig, FocusConfig, apply_focus, remove_focus
from hf_focus.branch import FocusBranch
from hf_focus.errors import FocusConfigError
from hf_focus.rotary import BASE, Rotation, rotate_by_place
from hf_focus.rotation_hooks import RotationHook

STILL = FocusConfig.build(SETTINGS, rotate_global=False)
ROTARY = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "modernbert")


def inputs_of(ids: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("name", ROTARY)
def test_the_global_branch_has_no_positions(name: str) -> None:
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


@given(
    length=st.integers(1, 12),
    more=st.integers(0, 9),
    start=st.integers(0, 50),
    is_causal=st.booleans(),
    qk_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_local_branch_has_those_of_the_model(
    length: int, more: int, start: int, is_causal: bool, qk_norm: bool, seed: int
) -> None:
    """It makes of queries and keys what it makes of those that a model with base 10,000 rotated, from any place on."""
    if not is_causal:
        more = 0
    torch.manual_seed(seed)
    config = FocusConfig.build(STILL, qk_norm=qk_norm, refiner=False, base_threshold=0.0)
    branch = FocusBranch(config, 4, 8, 8).double().eval()
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, output = torch.randn(2, 4, length, 8).double(), torch.randn(2, length, 4, 8).double()
    key, value = (torch.randn(2, 2, length + more, 8).double() for _ in range(2))
    angle = (start + torch.arange(length + more))[:, None] * BASE ** -(torch.arange(0, 8, 2).double() / 8)
    values = torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2)[:, None]
    rotation = Rotation(*values[:, :, more:])
    options = {"is_causal": is_causal, "query_offset": more, "rotation": rotation}
    found = branch(query, key, value, output, **options)
    branch.config = FocusConfig.build(config, rotate_global=True)
    first, second = _halves(query, values[:, :, more:]), _halves(key, values)
    torch.testing.assert_close(found, branch(first, second, value, output, **options), rtol=0, atol=1e-5)


def _halves(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """As transformers' Llama rotates."""
    cos, sin = values
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


def test_scores_depend_on_the_distance() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).double()
    query, key = query.expand(1, 1, 3, 8), key.expand(1, 1, 9, 8)
    rotated, keys, rotation = rotate_by_place(query, key, 4)
    scores = (rotated @ keys.mT)[0, 0]
    for distance in range(5):
        assert torch.allclose(scores[0, 4 - distance], scores[[1, 2], [5 - distance, 6 - distance]], atol=1e-6)
    assert rotation.values.shape == (2, 1, 3, 8)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"max_dist": 9}], ids=lambda x: str([*x]))
def test_decoding_equals_one_pass(name: str, cache: str, settings: dict[str, Any]) -> None:
    model = patched(name, FocusConfig.build(STILL, **settings), initializer_range=0.2).double()
    ids = tokens()
    expected = logits(model, **inputs_of(ids))
    past = StaticCache(config=model.config, max_cache_len=LENGTH + 3) if cache == "static" else None
    steps = []
    with torch.no_grad():
        # Several at once, and one by one
        for start, end in ((0, 5), (5, 9), *((place, place + 1) for place in range(9, LENGTH))):
            step = model(ids[:, start:end], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-5)


def test_padding_and_places_do_not_matter() -> None:
    model, ids = patched("llama", STILL, initializer_range=0.2).double(), tokens()
    expected = logits(model, **inputs_of(ids))
    padded = torch.cat([torch.full((2, 6), PAD), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), torch.ones_like(ids)], dim=1)
    found = logits(model, input_ids=padded, attention_mask=mask)[:, 6:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    places = torch.arange(LENGTH)[None] + 70
    assert torch.equal(logits(model, **inputs_of(ids, position_ids=places)), expected)
    # Two documents in one row
    both = torch.cat([ids[:1], ids[1:]], dim=1)
    packed = logits(model, input_ids=both, position_ids=torch.arange(LENGTH).repeat(2)[None], use_cache=False)
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
    assert loaded.config.focus_config["rotate_global"] is False
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
    assert hooks[0][0].hides


def test_refusals() -> None:
    model = TINY["bert"].build()
    before = logits(model, input_ids=tokens())
    with pytest.raises(FocusConfigError, match=r"`rotate_global` got False; accepted: True: `bert.*BertSelfAttention"):
        apply_focus(model, STILL)
    assert torch.equal(logits(model, input_ids=tokens()), before)
    with pytest.raises(FocusConfigError, match=r"`rotate_global` got False; accepted: True: an adapter leaves"):
        FocusAdapterConfig(focus_config=STILL)
    with pytest.raises(FocusConfigError, match="`rotate_global` got 1"):
        FocusConfig(rotate_global=1)
