"""The bounded cache: the same text as with a cache that keeps everything, in constant memory."""

from typing import Any

import pytest
import torch
from test_architectures import generate, padded
from test_base_features import llava, picture_and_text
from tiny import CAUSAL_LMS, LENGTH, patched, randomize, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from hf_focus import FocusAdapterConfig, FocusCache, FocusConfig, FocusError, apply_focus
from hf_focus.errors import FocusConfigError
from hf_focus.focus_cache import SinkWindowLayer

# Prompts of LENGTH tokens are longer than what a cache keeps.
# The refiner's bins turn rounding into jumps; it reads nothing of the cache
SHORT = FocusConfig(max_span=4, ramp=2, max_iterations=2, max_dist=6, sink_tokens=3, refiner=False)
# The local branch looks further than the global one
LONG_SPAN = FocusConfig.build(SHORT, max_span=7, max_dist=3)
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def text(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: Any) -> Any:
    settings = {"return_dict_in_generate": True, "output_logits": True, **settings}
    return generate(model, inputs, **settings)


def whole(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def assert_same_text(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for one_step, other_step in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(one_step, other_step, **TOLERANCE)


def ragged(*lengths: int) -> dict[str, Tensor]:
    """A left-padded batch."""
    rows = [padded(tokens(1, n, seed=n), max(lengths) - n, 0) for n in lengths]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("config", [SHORT, LONG_SPAN], ids=["short", "long span"])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_bounded_is_unbounded(name: str, config: FocusConfig, sinks: int) -> None:
    model = patched(name, FocusConfig.build(config, sink_tokens=sinks))
    short = {"max_new_tokens": 6, "min_new_tokens": 6}
    for inputs in ({"input_ids": tokens(1)}, ragged(LENGTH, 3, 11)):
        bounded = text(model, inputs, **short)
        assert isinstance(bounded.past_key_values, FocusCache)
        assert_same_text(bounded, text(model, inputs, past_key_values=whole(model), **short))
    assert torch.equal(bounded.sequences, generate(model, inputs, use_cache=False, **short))


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "chunks of the window": {"prefill_chunk_size": 1},
    "long": {"max_new_tokens": 40},
}


@pytest.mark.parametrize("config", [SHORT, LONG_SPAN], ids=["short", "long span"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way: str, config: FocusConfig) -> None:
    model, inputs = patched("llama", config), ragged(LENGTH, 2, 13)
    results = []
    for settings in ({}, {"past_key_values": whole(model)}):
        torch.manual_seed(0)
        results.append(text(model, inputs, **WAYS[way], **settings))
    assert isinstance(results[0].past_key_values, FocusCache)
    assert_same_text(*results)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("helper", ["model", "prompt"])
def test_assisted_generation(name: str, helper: str) -> None:
    """Drafts that are rejected are cropped from the cache."""
    model, ids = patched(name, SHORT), tokens(1, 12).repeat(1, 2)
    # The patched model's own class, so that the drafts are partly right
    settings = {"assistant_model": patched(name, LONG_SPAN)} if helper == "model" else {"prompt_lookup_num_tokens": 3}
    inputs = {"input_ids": ids}
    result = text(model, inputs, **settings)
    assert isinstance(result.past_key_values, FocusCache)
    assert torch.equal(result.sequences, generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_memory_is_constant(name: str) -> None:
    model = patched(name, SHORT)
    sizes = []
    for new in (1, 2, 40):
        result = text(model, ragged(LENGTH, 9), max_new_tokens=new, min_new_tokens=new)
        cache = result.past_key_values
        assert cache.get_seq_length() == LENGTH + new - 1
        stored = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        stored += [layer.sink_keys for layer in cache.layers if isinstance(layer, SinkWindowLayer)]
        sizes.append([x.shape[2] for x in stored])
        # What is held, not what is shown of it: the sinks, the window and the step under way. transformers' own
        # layer holds the prompt until the second step
        if name == "gemma2" and new < 40:
            continue
        assert all(x.untyped_storage().nbytes() <= x[:, :, :1].nbytes * (6 + 3) for x in stored if x.numel())
    assert all(size == sizes[0] for size in sizes)
    assert max(sizes[0]) == 5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_calls_of_ones_own(name: str) -> None:
    """A cache made by hand, one call for the prompt and one for each token after it."""
    model, inputs = patched(name, SHORT), ragged(LENGTH, 2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions, use_cache=False).logits
        cache, results = FocusCache(model.config, mask), []
        for start, stop in ((0, 9), (9, 10), (10, 15), *((i, i + 1) for i in range(15, LENGTH))):
            part = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            results.append(model(**part, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(results, dim=1)[mask.bool()], expected[mask.bool()], **TOLERANCE)
    # Without one, the model makes a cache that keeps everything
    with torch.no_grad():
        first = model(input_ids=ids[:1], use_cache=True)
        assert type(first.past_key_values) is DynamicCache
        rest = model(input_ids=tokens(1, 3), past_key_values=first.past_key_values).logits
        alone = model(input_ids=torch.cat([ids[:1], tokens(1, 3)], dim=1), use_cache=False).logits[:, LENGTH:]
    torch.testing.assert_close(rest, alone, **TOLERANCE)


@pytest.mark.parametrize("cache", ["static", "quantized"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
def test_other_caches(name: str, cache: str) -> None:
    model, inputs = patched(name, SHORT), ragged(LENGTH, 2)
    if cache == "static":
        expected = generate(model, inputs, use_cache=False)
        assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
        given = StaticCache(config=model.config, max_cache_len=LENGTH + 20)
        assert torch.equal(generate(model, inputs, past_key_values=given), expected)
    else:
        try:
            given = QuantizedCache(backend="fp8", config=model.config)
        except ValueError:
            pytest.skip("this transformers does not quantize it")
        exact = text(model, inputs, use_cache=False)
        result = text(model, inputs, past_key_values=given)
        assert torch.equal(result.logits[0], exact.logits[0])
        # Three bits of mantissa in keys and values; the logits spread by 0.1
        torch.testing.assert_close(result.logits[1], exact.logits[1], rtol=0, atol=0.02)


def test_eager_attention() -> None:
    model, inputs = patched("llama", SHORT), ragged(LENGTH, 2)
    expected = text(model, inputs)
    model.set_attn_implementation("eager")
    assert_same_text(text(model, inputs), expected)


def test_an_adapter_keeps_everything() -> None:
    """Its base is no model with a bounded cache; what it says is the same."""
    from peft import get_peft_model
    from tiny import TINY, randomize

    inputs = ragged(LENGTH, 2)
    adapter = get_peft_model(TINY["llama"].build(), FocusAdapterConfig(focus_config=SHORT)).eval()
    randomize(adapter)
    before = generate(adapter, inputs)
    assert torch.equal(generate(adapter, inputs, use_cache=False), before)
    assert torch.equal(generate(adapter.merge_and_unload(), inputs), before)


def test_going_back() -> None:
    model, ids = patched("llama", SHORT), tokens(1, LENGTH)
    cache = FocusCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-2)
        cache.activate_past_recording()
        model(input_ids=tokens(1, 4, seed=5), past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == LENGTH
        again = model(input_ids=tokens(1, 2, seed=6), past_key_values=cache).logits
        expected = model(input_ids=torch.cat([ids, tokens(1, 2, seed=6)], dim=1), use_cache=False).logits[:, LENGTH:]
        torch.testing.assert_close(again, expected, **TOLERANCE)
        # Anew
        cache.reset()
        assert cache.get_seq_length() == 0
        cache.crop(0)
        first = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(first, model(input_ids=ids, use_cache=False).logits, **TOLERANCE)


def test_rows_can_be_chosen() -> None:
    model, inputs = patched("llama", SHORT), ragged(LENGTH, 2)
    mask = inputs["attention_mask"]
    grown = torch.nn.functional.pad(mask, (0, 1), value=1)
    results = []
    for change in ("select", "repeat"):
        cache = FocusCache(model.config, mask)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            rows = torch.tensor([1, 0]) if change == "select" else torch.tensor([0, 0, 1, 1])
            cache.batch_select_indices(rows) if change == "select" else cache.batch_repeat_interleave(2)
            step = {"input_ids": torch.full((len(rows), 1), 7), "attention_mask": grown[rows]}
            step["position_ids"] = grown[rows].sum(-1, keepdim=True) - 1
            results.append(
                model(**step, past_key_values=cache).logits[[rows.tolist().index(0), rows.tolist().index(1)]]
            )
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"max_dist": None}, "max_dist"), ({"layers": [0]}, "layers"), ({}, "attention_mask")],
)
def test_what_cannot_be(change: dict[str, Any], named: str) -> None:
    model = patched("llama", FocusConfig.build(SHORT, **change))
    mask = torch.ones(1, 1, 4, 4) if named == "attention_mask" else None
    with pytest.raises(FocusConfigError, match=named):
        FocusCache(model.config, mask)
    if change:
        # generate knows, and keeps everything
        assert type(text(model, {"input_ids": tokens(1)}).past_key_values) is DynamicCache


def test_masks_of_ones_own_need_all_keys() -> None:
    model, ids = patched("llama", SHORT), tokens(1)
    cache = FocusCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(FocusError, match="DynamicCache"):
            model(
                input_ids=ids[:, :1],
                attention_mask=torch.ones(1, 1, 1, LENGTH + 1, dtype=torch.bool),
                past_key_values=cache,
            )


def test_used_anew_for_another_prompt() -> None:
    """After `reset` it is as it was made, whatever beams there were."""
    model, ids = patched("llama", SHORT), tokens(2, LENGTH)
    cache = FocusCache(model.config)
    generate(model, {"input_ids": ids}, past_key_values=cache, num_beams=2, max_new_tokens=3)
    cache.reset()
    with torch.no_grad():
        found = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("chosen", "bounded"),
    [
        ({}, True),
        ({"layers": [0]}, False),
        ({"modules": r"layers\.0\."}, False),
        ({"modules": "language_model"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [0, 2])
def test_only_the_decoder_s_layers_count(chosen: dict[str, Any], bounded: bool, sinks: int) -> None:
    model = llava()
    randomize(apply_focus(model, FocusConfig.build(SHORT, sink_tokens=sinks, **chosen)))
    inputs = picture_and_text()
    found = text(model, inputs, max_new_tokens=5, min_new_tokens=5)
    assert isinstance(found.past_key_values, FocusCache) == bounded
    expected = text(model, inputs, max_new_tokens=5, min_new_tokens=5, use_cache=False)
    assert_same_text(found, expected)


def test_a_cache_of_no_config() -> None:
    with pytest.raises(FocusConfigError, match="`config` got 'NoneType'"):
        FocusCache(None)


def test_layers_that_were_chosen_by_path_are_not_known_to_be_all() -> None:
    model = patched("llama", FocusConfig.build(SHORT, modules=r"layers\.0\."))
    with pytest.raises(FocusConfigError, match="modules"):
        FocusCache(model.config)
