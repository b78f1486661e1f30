"""The few operations of a decoded token: against the reference, and as what a model decodes with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import TIGHT, Case, assume_decided, cases, examples, solve, to
from hypothesis import given
from tiny import patched, tokens

from hf_focus import FocusConfig, FocusOutput, blocked, focus_attention
from hf_focus.attention import keep_problems
from hf_focus.one_query import is_one_query, solve_one_query
from hf_focus.problem import FocusProblem, changed

LARGE = Case(seed=3, batch=2, length=1, num_keys=40, dim=16, value_dim=12, max_span=20, ramp=6, mask="padding")


def one_query(case: Case) -> Case:
    return replace(case, length=1, options=(*case.options, ("is_causal", True), ("need_statistics", False)))


def problem_of(arguments: dict[str, Any]) -> FocusProblem:
    with keep_problems() as kept:
        focus_attention(**arguments, backend="reference")
    return kept[0]


def fast(arguments: dict[str, Any]) -> FocusOutput:
    return solve_one_query(problem_of(arguments))


@examples(600)
@given(cases(longest=9, widest=8))
def test_it_equals_the_reference(case: Case) -> None:
    arguments = one_query(case).arguments()
    expected = solve(arguments, "reference")
    assume_decided(arguments, expected)
    found = fast(arguments)
    assert torch.equal(found.iterations, expected.iterations)
    torch.testing.assert_close(found.output, expected.output, **TIGHT)


@pytest.mark.parametrize("span", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e9])
@pytest.mark.parametrize("everywhere", [False, True])
def test_spans_that_should_not_be(span: float, everywhere: bool) -> None:
    arguments = one_query(LARGE).arguments()
    arguments["span"][0, 0] = span
    if everywhere:
        arguments["span"].fill_(span)
    expected = solve(arguments, "reference").output
    torch.testing.assert_close(fast(arguments).output, expected, **TIGHT, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    arguments = to(one_query(LARGE).arguments(), dtype)
    arguments["base_threshold"] = 0.0
    found, expected = fast(arguments).output, solve(to(arguments, torch.float64), "reference").output
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


KEYS = ("key", "value")
OTHERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "two queries": lambda given: replace(LARGE, length=2).arguments() | {"need_statistics": False},
    "not causal": lambda given: given | {"is_causal": False},
    "statistics": lambda given: given | {"need_statistics": True},
    "many keys": lambda given: (
        given
        | {"max_span": 2**20, "attention_mask": None}
        | {k: given[k][:, :, :1].expand(-1, -1, 2**17, -1) for k in KEYS}
    ),
}


def test_no_sequence_at_all() -> None:
    given = one_query(LARGE).arguments()
    none = {name: x[:0] for name, x in given.items() if name in ("query", "key", "value", "span", "temperature")}
    given |= none | {"readout_weights": given["readout_weights"][:0], "attention_mask": given["attention_mask"][:0]}
    assert focus_attention(**given).output.shape == (0, 4, 1, 12)


def test_another_default_device() -> None:
    given = one_query(LARGE).arguments()
    expected = focus_attention(**given).output
    with torch.device("meta"):
        assert torch.equal(focus_attention(**given).output, expected)


def test_a_decoded_token_is_one() -> None:
    given = one_query(LARGE).arguments()
    assert is_one_query(problem_of(given))
    for name, change in OTHERS.items():
        assert not is_one_query(problem_of(change(dict(given)))), name
    other = problem_of(given)
    assert not is_one_query(changed(other, query=other.query.to("meta")))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "rotate_feedback": False}, {"max_dist": 6}])
@pytest.mark.parametrize("padded", [0, 3])
def test_a_model_decodes_as_it_reads(name: str, settings: dict, padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(name, FocusConfig(max_span=8, ramp=2, max_iterations=3, **settings))
    ids, used = tokens(2, 14), []
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0

    def solve_and_tell(problem: FocusProblem) -> FocusOutput:
        used.append(problem.query.shape[2])
        return solve_one_query(problem)

    monkeypatch.setattr(blocked, "solve_one_query", solve_and_tell)
    with torch.no_grad():
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        whole = model(input_ids=ids, attention_mask=mask, **places).logits[:, -1]
        before, last = ({k: v[:, part] for k, v in places.items()} for part in (slice(-1), slice(-1, None)))
        read = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, **before)
        assert not used
        options = {"attention_mask": mask, "past_key_values": read.past_key_values}
        decoded = model(input_ids=ids[:, -1:], **options, **last).logits[:, -1]
    assert used == [1] * model.config.num_hidden_layers
    torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-5)
