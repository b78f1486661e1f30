"""Costs of the evidence's models: against counts by brute force, and of running with a cache."""

import math

import pytest
import torch
from tiny import randomize

from hf_focus.evidence_cost import count_flops, keys_read, run_cost
from hf_focus.evidence_map import iteration_weights
from hf_focus.evidence_tasks import find_task
from hf_focus.evidence_variants import Sizes, build


def test_keys_read() -> None:
    task = find_task("dyck")
    ids = task.batch(1, torch.Generator().manual_seed(0), task.settings).input_ids
    for name, read, kept in (("plain", 64, 64), ("focus", 64, 64), ("hybrid, near", 8 + 4, 16 + 4)):
        # As far as the global branch looks, which is further than the spans, or as far as these could; and the sinks
        model = build(task, task.settings, name, Sizes(width=16), 0).eval()
        found = keys_read(model, input_ids=ids, use_cache=False)
        assert (found["keys_read"], found["keys_kept"]) == (read, kept), name
    assert keys_read(build(task, task.settings, "adaptive span", Sizes(width=16), 0), input_ids=ids)["keys_read"] == 64


def test_flops_grow_with_iterations() -> None:
    task = find_task("recall")
    ids = task.batch(1, torch.Generator().manual_seed(0), task.settings).input_ids
    counts = [
        count_flops(build(task, task.settings, name, Sizes(width=16), 0), input_ids=ids)
        for name in ("plain", "1 iteration", "4 iterations", "10 iterations")
    ]
    assert counts == sorted(counts)
    assert counts[3] > 1.5 * counts[1]


@pytest.mark.parametrize("variant", ["focus", "focus, near", "hybrid, near", "refiner"])
def test_keys_read_are_those_with_any_weight(variant: str) -> None:
    task = find_task("text")
    settings = task.with_settings({"length": 96, "megabytes": 0.1})
    model = randomize(build(task, settings, variant, Sizes(layers=2, width=16), 0)).eval()
    ids = task.batch(1, torch.Generator().manual_seed(0), settings).input_ids
    local = iteration_weights(model, ids)
    model.set_attn_implementation("eager")
    near = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    read = [
        ((far[0, :, -1] > 0) | (weights.amax(0)[:, -1] > 0)).sum(-1).float()
        for far, weights in zip(near, local.values(), strict=True)
    ]
    reached = [(weights.amax(0)[:, -1] > 0).sum(-1).float() for weights in local.values()]
    found = keys_read(model, input_ids=ids, use_cache=False)
    assert found["keys_read"] == pytest.approx(torch.stack(read).mean().item())
    assert found["local_keys"] == pytest.approx(torch.stack(reached).mean().item())
    if variant == "hybrid, near":
        assert found["keys_read"] < 64


def test_flops_count_the_future_for_nobody() -> None:
    task = find_task("text")
    settings = task.with_settings({"length": 64, "megabytes": 0.1})
    ids = task.batch(1, torch.Generator().manual_seed(0), settings).input_ids
    sizes = Sizes(layers=1, width=16)
    short, long = (
        count_flops(build(task, settings, "plain", sizes, 0), input_ids=ids[:, :length], use_cache=False)
        for length in (32, 64)
    )
    # Two products of two flops with each of the 16 features, of 16 keys more on average
    assert long - short == pytest.approx(2 * 2 * 16 * 16)


@pytest.mark.parametrize("variant", ["plain", "focus", "focus, near", "adaptive span", "log-n"])
def test_cost_of_running_with_a_cache(variant: str) -> None:
    task = find_task("text")
    settings = task.with_settings({"length": 128, "megabytes": 0.1})
    model = build(task, settings, variant, Sizes(layers=2, width=16, heads=2), 0)
    ids = task.batch(1, torch.Generator().manual_seed(0), settings).input_ids
    found = run_cost(model, ids, decoded=8)
    assert model.training
    assert min(found["prefill_seconds"], found["decode_seconds"]) > 0
    # Keys and values of 16 features in two layers; near: the longest span, without the query's own, and the sinks
    kept = (16 - 1) + 4 if variant == "focus, near" else 120
    assert found["cache_bytes"] == 2 * 2 * 16 * 4 * kept
    assert ("effective_tokens" in found) == (variant not in ("adaptive span", "log-n"))
    if "effective_tokens" in found:
        assert 1 <= found["effective_tokens"] <= 128
        assert 0 < found["attended"] <= 1
    if variant == "plain":
        model.eval().set_attn_implementation("eager")
        weights = torch.stack(model(input_ids=ids, output_attentions=True, use_cache=False).attentions)[..., -8:, :]
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        assert found["effective_tokens"] == pytest.approx(entropy.exp().mean().item(), rel=1e-4)
        assert math.isclose(found["cache_bytes"], 2 * 2 * 16 * 4 * 120)
