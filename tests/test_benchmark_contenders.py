"""The benchmark's contenders and models compute what they say. No time is asserted."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_focus import focus_attention
from hf_focus.bench_cases import Call, Case, band_facts, band_keys, make_inputs
from hf_focus.bench_contenders import FLEX, SDPA_CAUSAL, Contender, band_mask, block_mask, local_attention, seed_loop
from hf_focus.bench_focus import ONE_PASS, contenders
from hf_focus.bench_models import LIMITED, ORIGINAL, PATCHED, ModelCase, ModelShape, decode, forget_models, prefill
from hf_focus.bench_trained import trained_inputs

CASE = Case(64, batch=2, heads=2, head_dim=8, span=16)


def find(name: str) -> Contender:
    return {contender.name: contender for contender in contenders([1, 4])}[name]


def output(name: str, case: Case = CASE) -> Tensor:
    with torch.no_grad():
        return find(name).build(case).forward()


@pytest.mark.parametrize("name", ["SDPA band mask", "transformers sliding window"])
def test_one_pass_computes_what_a_banded_softmax_does(name: str) -> None:
    torch.testing.assert_close(output(ONE_PASS), output(name))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_local_attention_with_an_exact_window_sees_one_key_more(parts: int) -> None:
    pytest.importorskip("local_attention")
    with torch.no_grad():
        theirs = local_attention(parts, exact=True)(CASE).forward()
    query, key, value = make_inputs(CASE)
    span = torch.full((2, 1, 64), 17.0)
    ours = focus_attention(query, key, value, span, max_span=17, max_iterations=1).output
    torch.testing.assert_close(ours, theirs)


def test_local_attention_as_it_is_used_sees_at_least_the_span() -> None:
    pytest.importorskip("local_attention")
    # Its first window sees all that is before it
    torch.testing.assert_close(output("local-attention, span/1 × 1")[:, :, :16], output(SDPA_CAUSAL)[:, :, :16])


def test_causal_attention_is_one_pass_over_a_span_of_everything() -> None:
    case = replace(CASE, span=64)
    torch.testing.assert_close(output(ONE_PASS, case), output(SDPA_CAUSAL, case))


@pytest.mark.parametrize(("length", "span"), [(64, 16), (60, 17), (16, 16), (30, 100)])
def test_the_seeds_loop_is_additive_focus(length: int, span: int) -> None:
    query, key, value = make_inputs(replace(CASE, length=length))
    spans = torch.full((2, 1, length), float(span))
    settings = {"max_span": span, "max_iterations": 3, "feedback": "additive", "base_threshold": 0.0}
    ours = focus_attention(query, key, value, spans, threshold_scale=0.0, **settings).output
    torch.testing.assert_close(seed_loop(query, key, value, span, iterations=3), ours)


@pytest.mark.parametrize(("length", "span"), [(64, 16), (64, 5), (64, 1), (64, 100), (60, 16), (48, 17)])
def test_block_mask_is_the_one_that_asking_every_pair_gives(length: int, span: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    case = replace(CASE, length=length, span=span)
    ours = block_mask(case, size=8)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=8)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    # Whole blocks are told apart from those that need the mask, except the last where it is cut off
    whole = length // 8
    assert torch.equal(ours.full_kv_num_blocks[0, 0, :whole], theirs.full_kv_num_blocks[0, 0, :whole])


def test_flex_attention_computes_the_band() -> None:
    # Not compiled, which takes long
    from torch.nn.attention.flex_attention import flex_attention

    result = flex_attention(*make_inputs(CASE), block_mask=block_mask(CASE))
    torch.testing.assert_close(result, output("SDPA band mask"))


def test_one_query_against_a_cache_is_the_last_of_all() -> None:
    case = replace(CASE, queries=1)
    query, key, value = make_inputs(case)
    whole = torch.cat([key[:, :, :-1], query], dim=2)
    everything = focus_attention(whole, key, value, torch.full((2, 1, 64), 16.0), max_span=16, max_iterations=1)
    torch.testing.assert_close(output(ONE_PASS, case), everything.output[:, :, -1:])


@pytest.mark.parametrize("contender", contenders([1, 4]), ids=lambda contender: contender.name)
def test_every_contender_runs_and_trains_or_says_why_not(contender: Contender, tmp_path: Path) -> None:
    trained = ()
    if "trained" in contender.name:
        trained = ((4, str(trained_inputs(tmp_path, 2, 8, 16, 4, 64, steps=1))),)
    for training in (False, True):
        case = replace(CASE, batch=1, training=training, trained=trained)
        if reason := contender.why_not(case):
            assert reason.startswith(("not on cpu", "no backward on cpu", "local_attention is not installed"))
            continue
        if contender.name == FLEX:
            # Compiling is left to the benchmark itself
            continue
        call = contender.build(case)
        call.run()
        assert all(tensor.grad is None for tensor in call.leaves)
        assert all(tensor.requires_grad == training for tensor in call.leaves)


def test_reasons() -> None:
    absent = Contender("x", lambda case: Call(lambda: None), "", needs="no_such_package", backward=(), longest=32)
    assert absent.why_not(CASE) == "no_such_package is not installed"
    present = replace(absent, needs=None)
    assert present.why_not(replace(CASE, training=True)) == "no backward on cpu"
    assert present.why_not(CASE) == "a mask of 64 × 64"
    assert replace(present, half_only=True).why_not(CASE) == "no float32"
    assert replace(present, devices=()).why_not(CASE) == "not on cpu"
    assert present.why_not(replace(CASE, length=32)) is None


def test_flops_count_the_pairs_in_the_band() -> None:
    pairs = band_mask(CASE).sum().item() * 2 * 2
    facts = band_facts(CASE, band_keys(CASE, CASE.span), 3, block=8)
    assert facts["flops"] == 4 * 8 * pairs * 3
    assert facts["block_flops"] == facts["flops"] * 1.5
    assert facts["exponentials"] == pairs * 3
    assert facts["bytes"] == 4 * (2 * 2 * 64 * 8) * 4
    training = band_facts(replace(CASE, training=True), band_keys(CASE, CASE.span), 3, block=8)
    assert training["flops"] == 3.5 * facts["flops"]
    one = replace(CASE, queries=1)
    assert band_facts(one, band_keys(one, 16), 1, block=8)["flops"] == 4 * 8 * 2 * 2 * 16


def test_trained_inputs_are_those_of_a_shorter_text_first(tmp_path: Path) -> None:
    sizes = {"heads": 2, "head_dim": 8, "span": 16, "iterations": 4, "steps": 1}
    short = torch.load(trained_inputs(tmp_path, length=48, **sizes))
    file = trained_inputs(tmp_path, length=80, **sizes)
    long = torch.load(file)
    assert long["query"].shape == (1, 2, 80, 8)
    torch.testing.assert_close(long["query"][:, :, :48], short["query"])
    written = file.stat().st_mtime_ns
    assert trained_inputs(tmp_path, length=80, **sizes).stat().st_mtime_ns == written


def test_models_share_weights_and_have_left_the_start() -> None:
    forget_models()
    case = ModelCase(ModelShape(16, 2, 2, 1, 24, 50), 40, 8)
    original, patched, limited = (prefill(name, case) for name in (ORIGINAL, PATCHED, LIMITED))
    with torch.no_grad():
        logits = [call.forward() for call in (original, patched, limited)]
        assert logits[0].shape == (1, 1, 50)
        assert not torch.allclose(logits[0], logits[1], atol=1e-5)
        assert not torch.allclose(logits[1], logits[2], atol=1e-6)
        # A decoded token is what a prefill with that token more computes
        ids = torch.cat([case.ids(), case.ids()[:, :1]], dim=1)
        for name in (ORIGINAL, PATCHED, LIMITED):
            longer = SimpleNamespace(**{**vars(case), "ids": lambda length=None: ids})
            torch.testing.assert_close(decode(name, case).forward()[:, -1:], prefill(name, longer).forward())
    assert original.facts() == {}
    assert 1 < patched.facts()["mean_iterations"] <= 4
    forget_models()
