"""`max_dist` without a tokens × tokens mask: equal to the dense mask, for every way of masking, and in O(T) memory."""

import copy
from typing import Any

import pytest
import torch
from helpers import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import no_dropout, padded
from tiny import CAUSAL_LMS, ENCODERS, LENGTH, TINY, logits, make_inputs, patched, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from hf_focus import FocusConfig, record_focus
from hf_focus.band_attention import band_attention
from hf_focus.band_mask import BandMask, first_tokens
from hf_focus.global_branch import attend_block
from hf_focus.masks import count_visible, own_key_visible, read_mask

LIMITED = FocusConfig(max_span=5, ramp=2, max_iterations=2, max_dist=4, sink_tokens=2, refiner=True)
KINDS = ["plain", "left", "right", "holes", "packed", "sliding", "bidirectional", "bidirectional padded"]
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def make_mask(kind: str, length: int, past: int = 0, dtype: torch.dtype = torch.bool) -> BandMask:
    """Two rows of one kind."""
    num_keys, padding, function = past + length, None, causal_mask_function
    place = torch.arange(num_keys)
    if kind == "left" or kind == "bidirectional padded":
        padding = place >= torch.tensor([[0], [min(5, num_keys - 1)]])
    elif kind == "right":
        padding = place < torch.tensor([[num_keys], [max(num_keys - 4, 1)]])
    elif kind == "holes":
        padding = (place % 3 != 1).expand(2, -1)
    elif kind == "sliding":
        function = sliding_window_causal_mask_function(6)
    elif kind == "packed":
        positions = torch.stack([place % 7, place % (num_keys // 2 + 1)])
        document = (positions == 0).cumsum(-1)

        def function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[b, q] == document[b, k]) & (k <= q)

    if kind.startswith("bidirectional"):
        function = bidirectional_mask_function
    plain = kind in ("plain", "bidirectional")
    return BandMask(function, 2, length, num_keys, past, padding=padding, is_plain=plain, dtype=dtype)


def written_out(mask: BandMask, max_dist: int, sinks: int, packed: bool) -> Tensor:
    """The limited mask, entry by entry."""
    visible = mask.dense().expand(mask.shape)[:, 0]
    result = torch.zeros_like(visible)
    batch, length, num_keys = visible.shape
    for b in range(batch):
        for t in range(length):
            own = mask.query_offset + t
            first = [s for s in range(num_keys) if mask.padding is None or mask.padding[b, s]]
            if packed:
                first = [s for s in first if s <= own and visible[b, s, : s + 1].sum() <= sinks and visible[b, t, s]]
            for s in range(num_keys):
                near = abs(own - s) < max_dist
                result[b, t, s] = visible[b, t, s] and (near or s in first[:sinks])
    return result[:, None]


@given(
    kind=st.sampled_from(KINDS),
    length=st.integers(1, 20),
    past=st.integers(0, 9),
    max_dist=st.integers(1, 12),
    sinks=st.integers(0, 3),
    size=st.integers(1, 8),
)
@examples
def test_limited_attention_is_dense_attention(
    kind: str, length: int, past: int, max_dist: int, sinks: int, size: int
) -> None:
    past = 0 if kind in ("packed", "bidirectional", "bidirectional padded") else past
    mask = make_mask(kind, length, past)
    expected_mask = written_out(mask, max_dist, sinks, kind == "packed")
    assert torch.equal(mask.dense(max_dist, sinks).expand(mask.shape), expected_mask)
    noise = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 3, generator=noise, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, past + length, 3, generator=noise, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, past + length, 5, generator=noise, dtype=torch.float64, requires_grad=True)
    is_causal = not kind.startswith("bidirectional")
    output = band_attention(attend_block, query, key, value, mask, max_dist, sinks, is_causal, size=size)
    dense = scaled_dot_product_attention(query, key, value, expected_mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(output, dense, rtol=0, atol=1e-12)
    weight = torch.randn(output.shape, generator=noise, dtype=torch.float64)
    ours = torch.autograd.grad((output * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((dense * weight).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_parts_of_the_tensor(kind: str) -> None:
    mask = make_mask(kind, 15)
    dense = mask.dense().expand(mask.shape)
    for rows, columns in ((slice(0, 4), slice(2, 9)), (slice(7, 15), slice(None)), (slice(14, 15), slice(0, 15))):
        part = mask.read(rows, columns)
        assert torch.equal(part.expand(2, 1, -1, -1), dense[:, :, rows, columns])
        assert torch.equal(part, read_mask(mask, rows, columns))
    assert torch.equal(mask.read_own().expand(2, 15), dense[:, 0].diagonal(dim1=1, dim2=2))
    band = mask.read_band(4).expand(2, 1, 15, 4)
    for t in range(15):
        for j in range(4):
            s = t - 3 + j
            assert torch.equal(band[:, 0, t, j], dense[:, 0, t, s] if s >= 0 else torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "holes", "bidirectional padded"])
def test_visible_keys_are_counted(kind: str, past: int) -> None:
    past = 0 if kind.startswith("bidirectional") else past
    mask = make_mask(kind, 9, past)
    arguments = (9, past + 9, past, 4, not kind.startswith("bidirectional"), torch.device("cpu"))
    counted = count_visible(mask, *arguments, size=4)
    assert torch.equal(counted, count_visible(mask.dense(), *arguments))
    assert torch.equal(own_key_visible(mask, 9, past + 9, past, arguments[-1]), mask.read_own())


def test_what_asks_for_a_tensor_gets_it() -> None:
    """Models that slice the mask, add to it or combine it."""
    mask = make_mask("left", 8, dtype=torch.float32)
    dense = make_mask("left", 8).dense()
    additive = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    assert torch.equal(mask[:, :, 2:4, :5], additive[:, :, 2:4, :5])
    assert torch.equal(torch.ones(8, 8) + mask, 1 + additive)
    assert torch.equal(mask.masked_fill(dense, 3), additive.masked_fill(dense, 3))
    assert torch.equal(torch.cat([mask, mask]), torch.cat([additive, additive]))
    assert torch.equal(copy.copy(mask).dense(), additive)
    assert mask.to("cpu") is mask.contiguous()


def test_first_tokens() -> None:
    tokens = torch.tensor([[False, True, True, True], [False, False, True, False], [True, True, True, True]])
    assert first_tokens(tokens, 2).tolist() == [[1, 2], [2, 4], [0, 1]]


def densified(
    name: str, inputs: dict[str, Any], config: FocusConfig, monkeypatch: Any, implementation: str | None = None
) -> Tensor:
    """The same model with every lazy mask replaced by its tensor."""
    with monkeypatch.context() as patch:
        patch.setattr("hf_focus.model_masks.is_traced", lambda: True)
        patch.setattr("hf_focus.global_branch.is_traced", lambda: True)
        model = patched(name, config)
        if implementation is not None:
            model.set_attn_implementation(implementation)
        return logits(model, **inputs)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name: str, sinks: int, monkeypatch: Any) -> None:
    config = FocusConfig.build(LIMITED, sink_tokens=sinks)
    inputs = make_inputs(name)
    limited = logits(patched(name, config), **inputs)
    torch.testing.assert_close(limited, densified(name, inputs, config, monkeypatch), rtol=0, atol=1e-5)
    assert not torch.allclose(limited, logits(patched(name, FocusConfig.build(config, max_dist=None)), **inputs))


@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.parametrize("name", [n for n in CAUSAL_LMS + ENCODERS if n not in ("distilbert", "opt")])
def test_padding_and_packing(name: str, side: str, monkeypatch: Any) -> None:
    """Sequences alone are the same as in a padded batch, or packed in one row."""
    model = patched(name, LIMITED)
    if side == "packed":
        if name in ENCODERS:
            pytest.skip("an encoder has no packing by positions")
        parts = [tokens(1, 9, seed=1), tokens(1, 14, seed=2)]
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
        result = logits(model, input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False)
        expected = torch.cat([logits(model, input_ids=part) for part in parts], dim=1)
    else:
        ids, other = tokens(1, 12), tokens(1, 17, seed=7)
        inputs = padded(ids, *((5, 0) if side == "left" else (0, 5)))
        batch = {key: torch.cat([value, torch.ones_like(value)]) for key, value in inputs.items()}
        batch["input_ids"][1] = other[0]
        first = 1 if name == "roberta" else 0
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0) + first
        result = logits(model, **batch)[:1, 5 if side == "left" else 0 :][:, :12]
        expected = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_layers_without_a_branch_see_everything(name: str, implementation: str, monkeypatch: Any) -> None:
    """They get the tensor, and are not limited."""
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2 has a soft cap, which sdpa has not")
    config = FocusConfig.build(LIMITED, layers=[1])
    ids = tokens(2, LENGTH)
    inputs = make_inputs(name) if name == "t5" else padded(ids[:, 4:], 4, 0)
    model = patched(name, config)
    model.set_attn_implementation(implementation)
    expected = densified(name, inputs, config, monkeypatch, implementation)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_of_tokens_times_tokens(padding: int, training: bool) -> None:
    length = 1024
    config = FocusConfig(max_span=16, ramp=4, max_iterations=2, max_dist=32)
    model = patched("llama", config, max_position_embeddings=length).train(training)
    inputs = padded(tokens(1, length - padding), padding, 0)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        result = model(**inputs, use_cache=False, logits_to_keep=1).logits
        if training:
            result.sum().backward()
    assert largest.elements < length * length // 4


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bert"])
def test_training(name: str, checkpointing: bool | None, monkeypatch: Any) -> None:
    """Gradients are those of the dense mask, also when layers run again in the backward pass."""
    config, inputs, results = FocusConfig.build(LIMITED, refiner=False), padded(tokens(2, 15), 5, 0), []
    for dense in (False, True):
        with monkeypatch.context() as patch:
            if dense:
                patch.setattr("hf_focus.model_masks.is_traced", lambda: True)
                patch.setattr("hf_focus.global_branch.is_traced", lambda: True)
            model = no_dropout(patched(name, config)).double()
            if checkpointing is not None and not dense:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
                model.enable_input_require_grads()
            mask = inputs["attention_mask"].bool()
            model(**inputs).logits[mask].square().mean().backward()
            results.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-8, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_compiled(name: str) -> None:
    """A graph takes the dense mask, with the same result; so does a compiled decode step."""
    torch._dynamo.reset()
    # The layers of gemma2 are of two kinds
    model, ids = patched(name, LIMITED, num_hidden_layers=2 if name == "gemma2" else 1), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=0, atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        last = step(input_ids=ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], logits(model, input_ids=ids)[:, -1], rtol=0, atol=1e-5)


def test_dropout_of_the_global_branch() -> None:
    model = patched("llama", LIMITED, attention_dropout=0.5).train()
    ids = tokens(1)
    torch.manual_seed(0)
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.allclose(one, other)


def test_observers_see_the_padding() -> None:
    model, inputs = patched("llama", LIMITED), padded(tokens(2, 15), 5, 0)
    with record_focus(model) as records:
        logits(model, **inputs)
    for calls in records.layers.values():
        assert torch.equal(calls[0].valid, inputs["attention_mask"].bool())
