"""`inspect_model`: its numbers are what the layers did."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_same_buffers, buffers
from inspected_models import SETTINGS, acting, inspected, page
from small_runs import SENTENCE, byte_tokenizer, tiny_bert, tiny_llama
from tiny import tokens
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from hf_focus import apply_focus, record_focus
from hf_focus.attention import focus_attention
from hf_focus.backends import BACKENDS
from hf_focus.errors import FocusDataError, NotPatchedError
from hf_focus.inspection import (
    NEGLIGIBLE,
    QUANTILES,
    attention_maps,
    attention_weights,
    inspect_model,
    observe_problems,
)
from hf_focus.inspection_text import COLUMNS, short_names, to_text
from hf_focus.observers import FocusRecord
from hf_focus.problem import FocusProblem
from hf_focus.reference import focus_reference


def problems(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, tuple[FocusProblem, FocusRecord]]:
    found = {}

    def keep(name: str, problem: FocusProblem, record: FocusRecord) -> None:
        assert name not in found, "one call a layer"
        found[name] = (problem, record)

    with observe_problems(model, keep), torch.no_grad():
        model(input_ids=ids)
    return found


def problem(seed: int = 0, **changes: Any) -> FocusProblem:
    """Grouped heads, values of another size than keys, a mask, a bias: all that a problem can have."""
    noise = torch.Generator().manual_seed(seed)
    heads, kv_heads, length, dim, value_dim, iterations = 4, 2, 12, 6, 5, 4

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    values = {
        "query": normal(1, heads, length, dim) * 2,
        "key": normal(1, kv_heads, length, dim),
        "value": normal(1, kv_heads, length, value_dim),
        "span": normal(1, heads, length).abs() * 4,
        "sharpness": 1 + normal(1, heads, length).abs(),
        "readout_weights": normal(1, heads, length, iterations).softmax(-1),
        "feedback_matrix": normal(heads, value_dim, dim),
        "mix": normal(heads).sigmoid(),
        "gain": normal(heads).exp(),
        "rotation": None,
        "attention_mask": (torch.rand(1, 1, length, length, generator=noise) < 0.8) | torch.eye(length).bool(),
        "position_bias": normal(1, heads, length, length),
        "is_causal": True,
        "scaling": 0.4,
        "softcap": None,
        "query_offset": 0,
        "max_span": 7,
        "ramp": 3,
        "max_iterations": iterations,
        "feedback": "normalized",
        "anchored": False,
        "rotary_pairs": "halves",
        "stop": "absolute",
        # Some queries stop before the others
        "base_threshold": 0.05,
        "threshold_scale": 0.1,
        "coverage_threshold": 0.01,
        "need_statistics": True,
    }
    return FocusProblem(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": False, "softcap": 3.0},
        {"feedback": "additive", "feedback_matrix": None, "mix": None, "gain": None},
        {"anchored": True, "stop": "relative", "mix": None},
        {"base_threshold": 0.0, "threshold_scale": 0.0},
    ],
    ids=str,
)
def test_attention_weights_are_those_of_focus_attention(changes: dict[str, Any]) -> None:
    p = problem(**changes)
    last = focus_reference(replace(p, readout_weights=None))
    if "base_threshold" not in changes:
        assert len(last.iterations.unique()) > 1, "the test needs queries that stop at different times"
    value = p.value.repeat_interleave(2, dim=1)
    weights = attention_weights(p, last.iterations - 1)
    torch.testing.assert_close(weights @ value, last.output)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    torch.testing.assert_close(torch.special.entr(weights).sum(-1), last.entropy)
    once = focus_reference(replace(p, readout_weights=None, max_iterations=1))
    first = attention_weights(p, torch.zeros_like(last.iterations))
    torch.testing.assert_close(first @ value, once.output)
    assert not torch.allclose(first, weights)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_observed_problems_are_the_layers_own(backend: str) -> None:
    before = dict(BACKENDS)
    model, other = acting(tiny_llama(), backend=backend, readout="last"), acting(tiny_llama())
    ids = tokens(1, 20)
    found = problems(model, ids)
    assert list(found) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert before == BACKENDS
    with record_focus(model) as records, torch.no_grad():
        model(input_ids=ids)
    for name, (p, record) in found.items():
        assert torch.equal(record.entropy, records[name][0].entropy)
        solved = focus_attention(
            **{
                tensor: getattr(p, tensor)
                for tensor in ("query", "key", "value", "span", "feedback_matrix", "mix", "gain", "rotation")
            },
            temperature=p.sharpness.reciprocal(),
            max_span=p.max_span,
            ramp=p.ramp,
            max_iterations=p.max_iterations,
            base_threshold=p.base_threshold,
        )
        torch.testing.assert_close(solved.entropy, record.entropy)
        weights = attention_weights(p, record.iterations - 1)
        torch.testing.assert_close(weights @ p.value.repeat_interleave(2, dim=1), solved.output)

    def never(*call: Any) -> None:
        raise AssertionError("this is another model")

    with observe_problems(model, never), torch.no_grad():
        other(input_ids=ids)
    with pytest.raises(RuntimeError, match="stop"), observe_problems(model, lambda *call: None):
        raise RuntimeError("stop")
    assert before == BACKENDS


def test_measures_are_what_the_layers_did() -> None:
    model = acting(tiny_llama())
    inspection = inspected(model)
    ids = byte_tokenizer()(SENTENCE, return_tensors="pt")["input_ids"][:, :48]
    assert (inspection.texts, inspection.tokens) == (1, 48)
    found = problems(model, ids)
    assert [layer.name for layer in inspection.layers] == list(found)
    for layer in inspection.layers:
        p, record = found[layer.name]
        measures = layer.measures
        weights = attention_weights(p, record.iterations - 1)[0]
        context = torch.arange(1, 49)
        distance = torch.arange(48)[:, None] - torch.arange(48)
        in_span = (distance >= 0) & (distance < 8) & (distance < record.span[0, ..., None] + 3)
        kept = (weights > NEGLIGIBLE).sum(-1) / in_span.sum(-1)
        expected = {
            "span": record.span,
            "entropy": record.entropy,
            "effective_keys": record.entropy.exp(),
            "coverage": record.coverage,
            "iterations": record.iterations.float(),
            "temperature": 1 / p.sharpness,
            "kept": kept[None],
        }
        for name, values in expected.items():
            assert getattr(measures, name) == pytest.approx(values[0].mean(-1).tolist(), rel=1e-4), name
        for head, quantiles in enumerate(measures.span_quantiles):
            expected = [record.span[0, head].quantile(q).item() for q in QUANTILES]
            assert quantiles == pytest.approx(expected, rel=1e-4)
        assert measures.iteration_counts == [int((record.iterations == n).sum()) for n in (1, 2, 3)]
        assert measures.action_counts == [int((record.action == n).sum()) for n in range(10)]
        assert torch.tensor(measures.readout).sum(-1).tolist() == pytest.approx([1] * 4)
        assert measures.is_causal
        for number, (low, high) in enumerate([(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]):
            within = record.entropy[0][:, (context > low) & (context <= high)]
            assert inspection.context_bins[number] == high
            assert measures.entropy_by_context[number] == pytest.approx(within.mean().item(), rel=1e-4, abs=1e-6)


def test_parts_are_counted() -> None:
    plain = tiny_llama().num_parameters()
    model = acting(tiny_llama(), layers=[1])
    inspection = inspect_model(model)
    assert inspection.base_parameters == plain
    assert inspection.focus_parameters == model.num_parameters() - plain == inspection.layers[0].parameters
    assert (len(inspection.layers), inspection.layers_in_model) == (1, 2)
    join = model.model.layers[1].self_attn.focus.join
    assert inspection.layers[0].join_size == pytest.approx(join.square().mean().sqrt().item())
    assert inspection.buffer_bytes == sum(b.nbytes for n, b in model.named_buffers() if ".focus." in n)
    assert inspection.model_class == "FocusLlamaForCausalLM"
    assert inspection.model_type == "llama"
    assert inspection.settings == model.focus_config.to_dict()
    assert inspection.layers[0].measures is None
    assert inspection.maps == []


def test_the_drift_of_the_refiner() -> None:
    model = apply_focus(tiny_llama(), SETTINGS)
    refiner = model.model.layers[0].self_attn.focus.refiner
    refiner.table[5, 2], refiner.table[7, 2], refiner.table[7, 9] = 1.0, -3.0, 2.0
    refiner.num_updates.fill_(6)
    moved, still = (layer.refiner for layer in inspect_model(model).layers)
    assert (moved.updates, moved.states_visited, moved.mean_change, moved.largest_change) == (6, 2, 2.0, 3.0)
    assert moved.action_values == [0, 0, -1, 0, 0, 0, 0, 0, 0, 1]
    assert (still.updates, still.states_visited, still.mean_change, still.action_values) == (0, 0, 0, [0] * 10)


def test_nothing_changes() -> None:
    model = acting(tiny_llama()).train()
    before, state = buffers(model), {name: value.clone() for name, value in model.named_parameters()}
    first = inspected(model)
    assert model.training
    assert_same_buffers(model, before)
    assert all(torch.equal(value, state[name]) for name, value in model.named_parameters())
    assert inspected(model) == first


def test_maps_show_the_heads_that_change_most() -> None:
    model, ids = acting(tiny_llama()), tokens(1, 10)
    maps = attention_maps(model, ids, list("abcdefghij"), 3)
    changes = {}
    for name, (p, record) in problems(model, ids).items():
        moved = attention_weights(p, record.iterations - 1) - attention_weights(p, torch.zeros_like(record.iterations))
        for head, change in enumerate(moved[0].abs().sum(-1).mean(-1) / 2):
            changes[name, head] = change.item()
    best = sorted(changes, key=changes.__getitem__, reverse=True)[:3]
    assert [(item.layer, item.head) for item in maps] == best
    assert maps[0].change == pytest.approx(changes[best[0]], rel=1e-4)
    first, last = torch.tensor(maps[0].first), torch.tensor(maps[0].last)
    assert first.shape == last.shape == (10, 10)
    assert first.triu(1).abs().max() == last.triu(1).abs().max() == 0
    assert maps[0].tokens == list("abcdefghij")


def bart() -> PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=300, d_model=8, max_position_embeddings=64, **sizes, **heads)
    )


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_bert, {"per_head_span": False, "span_granularity": "window"}),
        (tiny_llama, {"refiner": False, "readout": "last", "max_iterations": 1}),
        (bart, {"feedback": "additive"}),
    ],
)
def test_other_models_and_settings(make: Any, settings: dict[str, Any]) -> None:
    model = acting(make(), **settings)
    inspection = inspected(model, SENTENCE, SENTENCE, "", max_tokens=32, map_tokens=5, num_maps=1)
    assert (inspection.texts, inspection.tokens) == (2, 48)
    assert all(layer.measures is not None for layer in inspection.layers)
    causal = {layer.name: layer.measures.is_causal for layer in inspection.layers}
    assert causal == {name: "encoder" not in name for name in causal}
    assert json.loads(json.dumps(inspection.to_dict(), allow_nan=False)) == inspection.to_dict()
    lines = to_text(inspection).splitlines()
    assert all(column.name in lines[-len(inspection.layers) - 1] for column in COLUMNS)
    if settings.get("refiner") is False:
        assert inspection.layers[0].refiner is None
    if make is tiny_bert:
        # Every query of an encoder sees the whole text: 32 tokens, or 16
        by_context = inspection.layers[0].measures.entropy_by_context
        assert [value is not None for value in by_context] == [False, False, False, False, True, True]
    page(inspection)


def test_refusals() -> None:
    with pytest.raises(NotPatchedError, match="LlamaForCausalLM"):
        inspect_model(tiny_llama())
    with pytest.raises(FocusDataError, match="texts"):
        inspect_model(acting(tiny_llama()), byte_tokenizer(), ["", ""])


def test_short_names() -> None:
    assert short_names(["model.layers.0.self_attn", "model.layers.11.self_attn"]) == ["0", "11"]
    t5 = ["encoder.block.0.layer.0.SelfAttention", "decoder.block.3.layer.0.SelfAttention"]
    assert short_names(t5) == ["encoder.0", "decoder.3"]
    assert short_names(["model.layers.3.self_attn"]) == ["3"]
    assert short_names(["attention"]) == ["attention"]
    assert short_names(["a.0", "b.c.0"]) == ["a.0", "b.c.0"]
