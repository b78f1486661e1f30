"""`global_exponent_start`: the global branch attends more sharply where there are more keys."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import (
    LENGTH,
    SETTINGS,
    TINY,
    decoded,
    in_one_row,
    left_padded,
    logits,
    make_inputs,
    patched,
    randomize,
    tokens,
)
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
)
from transformers.masking_utils import eager_mask

from hf_focus import FocusA, FocusAdapterConfig, FocusConfig, apply_focus, remove_focus
from hf_focus.errors import FocusConfigError
from hf_focus.masks import count_all_visible

SHARPER = FocusConfig.build(SETTINGS, global_exponent_start=1.25)
# Plain scores: no cap, no bias, and no other sequence that is attended to
NAMES = ("llama", "mistral", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "bert", "modernbert", "vit", "wav2vec2")


def sharper(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention whose logits are multiplied by ((1 + log n) / (1 + log 16))^1.25, n counted a query at a time."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    mask = torch.zeros_like(scores) if mask is None else mask.expand_as(scores)
    for row in range(scores.shape[0]):
        for place in range(scores.shape[2]):
            seen = sum(value == 0 for value in mask[row, 0, place].tolist())
            scores[row, :, place] *= ((1 + math.log(max(seen, 1))) / (1 + math.log(16))) ** 1.25
    return ((scores + mask).softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("sharper", sharper)
AttentionMaskInterface.register("sharper", eager_mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("implementation", "atol"), [("sdpa", 1e-9), ("eager", 1e-5)], ids=["sdpa", "eager"])
def test_logits_grow_with_the_keys(name: str, implementation: str, atol: float) -> None:
    """Eager attention has its softmax in float32."""
    model, inputs = TINY[name].build(initializer_range=0.2).double(), make_inputs(name)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    original = logits(model, **inputs)
    model.set_attn_implementation("sharper")
    expected = logits(model, **inputs)
    model.set_attn_implementation(implementation)
    # The local branch is silent yet: what is left is the global one
    found = logits(apply_focus(model, SHARPER), **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert (found - original).abs().max() > 1e-4
    torch.testing.assert_close(logits(remove_focus(model), **inputs), original, rtol=0, atol=atol)


@pytest.mark.parametrize("name", TINY)
def test_a_start_at_zero_changes_nothing_and_learns(name: str) -> None:
    model, inputs = TINY[name].build(), make_inputs(name)
    before = logits(model, **inputs)
    apply_focus(model, FocusConfig.build(SETTINGS, global_exponent_start=0))
    assert torch.equal(logits(model, **inputs), before)
    model.train()(**inputs).logits.square().mean().backward()
    exponents = [p for path, p in model.named_parameters() if path.endswith("global_temperature.exponent")]
    assert exponents
    assert all(exponent.grad.abs().min() > 0 for exponent in exponents)


@given(
    length=st.integers(1, 9),
    more=st.integers(0, 9),
    is_causal=st.booleans(),
    kind=st.sampled_from(["none", "bool", "additive", "row", "column"]),
    seed=st.integers(0, 1000),
)
def test_count_all_visible(length: int, more: int, is_causal: bool, kind: str, seed: int) -> None:
    noise, num_keys = torch.Generator().manual_seed(seed), length + more
    shape = (2, 1, 1 if kind == "row" else length, 1 if kind == "column" else num_keys)
    visible = torch.rand(shape, generator=noise) < 0.6
    mask = torch.zeros(shape).masked_fill(~visible, -1e9) if kind == "additive" else visible
    mask = None if kind == "none" else mask
    counts = count_all_visible(mask, length, num_keys, is_causal, torch.device("cpu")).expand(2, 1, length)
    visible = visible.expand(2, 1, length, num_keys)
    if kind == "none":
        # As scaled_dot_product_attention has it: the first queries stand at the first keys
        visible = torch.ones(2, 1, length, num_keys, dtype=torch.bool)
        visible = visible.tril() if is_causal else visible
    assert counts.tolist() == [[[max(sum(row), 1) for row in head] for head in item] for item in visible.tolist()]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_equals_one_pass(name: str, cache: str) -> None:
    model, ids = patched(name, SHARPER, initializer_range=0.2).double(), tokens()
    everything = torch.ones_like(ids)
    expected = logits(model, input_ids=ids, attention_mask=everything)
    torch.testing.assert_close(decoded(model, ids, cache), expected, rtol=0, atol=1e-5)


def test_padding_and_packing_do_not_count() -> None:
    model, ids = patched("llama", SHARPER, initializer_range=0.2).double(), tokens()
    expected = logits(model, input_ids=ids)
    padded = left_padded(ids)
    positions = (padded["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    found = logits(model, **padded, position_ids=positions)[:, -LENGTH:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    packed = logits(model, **in_one_row(ids))
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_decoder_that_sees_both_sides(implementation: str) -> None:
    """Its attention is said to be causal, and no mask says otherwise where there is no padding."""
    model = TINY["llama"].build(
        "LlamaModel", is_causal=False, initializer_range=0.2, attn_implementation=implementation
    )
    apply_focus(model, SHARPER)
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 12:] = 0
    with torch.no_grad():
        beside = model(ids, attention_mask=mask).last_hidden_state[:1]
        alone = model(ids[:1]).last_hidden_state
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = patched("llama", SHARPER), tokens()
    assert model.model.layers[0].self_attn.focus.global_temperature.exponent.shape == (4,)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.focus_config["global_exponent_start"] == 1.25
    assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))


def test_compiled() -> None:
    torch._dynamo.reset()
    model, ids = patched("llama", SHARPER, num_hidden_layers=1), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=0, atol=1e-6)


def test_an_adapter_has_it_too() -> None:
    ids, base = tokens(), TINY["llama"].build(initializer_range=0.2)
    before = logits(base, input_ids=ids)
    adapted = randomize(get_peft_model(base, FocusAdapterConfig(focus_config=SHARPER))).eval()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, input_ids=ids), before)
    assert (logits(adapted, input_ids=ids) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted.merge_and_unload(), input_ids=ids), logits(adapted, input_ids=ids))


def test_refusals() -> None:
    with pytest.raises(FocusConfigError, match="`global_exponent_start` got 1; accepted: None with max_dist"):
        FocusConfig(global_exponent_start=1, max_dist=64)
    with pytest.raises(FocusConfigError, match="`global_exponent_start` got 1; accepted: None: the global attention"):
        FocusA(32, 4, global_exponent_start=1)
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)).eval()
    before = logits(model, input_ids=tokens())
    message = "`global_exponent_start` got 1.25; accepted: None: `transformer.*BloomAttention.* interface"
    with pytest.raises(FocusConfigError, match=message):
        apply_focus(model, SHARPER)
    assert torch.equal(logits(model, input_ids=tokens()), before)
