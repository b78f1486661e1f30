"""Targets: judged by the rows alone."""

from dataclasses import replace

import pytest

from hf_focus.evidence_groups import GROUPS
from hf_focus.evidence_plan import ACCURACY, STEPS, accuracy_on
from hf_focus.evidence_targets import (
    TARGETS,
    BetterBy,
    FewerSolved,
    Keeps,
    Outcome,
    RatioAtMost,
    SolvedShare,
    StaysBelow,
    Target,
    Verdict,
)


def rows(solved: list[bool], accuracy: list[float]) -> dict[int, dict[str, object]]:
    return {
        seed: {"steps": 100, "steps_to_solved": 10 if s else None, "results": {"train": {"accuracy": a}}}
        for seed, (s, a) in enumerate(zip(solved, accuracy, strict=True))
    }


FOUND = {
    "focus": rows([True] * 9 + [False], [0.9, 0.91, 0.92, 0.93, 0.94] * 2),
    "plain": rows([False] * 10, [0.5] * 10),
}
SAME = "92.0 [90.9, 93.1]"


def of_tests(**accuracy: float) -> dict[str, object]:
    return {"results": {test: {"accuracy": value} for test, value in accuracy.items()}}


def test_targets_are_judged_by_the_rows() -> None:
    wanted = Verdict("9 of 10 solved", "0 of 10 solved", "90%", 10, Outcome.REACHED)
    assert SolvedShare("focus", "plain", 0.9)(FOUND) == wanted
    assert SolvedShare("focus", "plain", 0.95)(FOUND).outcome is Outcome.MISSED
    assert SolvedShare("other", "plain", 0.9)(FOUND) is None
    assert FewerSolved("focus", "plain")(FOUND).measured == "+9 seeds"
    assert FewerSolved("plain", "focus")(FOUND).outcome is Outcome.MISSED
    assert StaysBelow("focus", "plain", ACCURACY, 51)(FOUND).outcome is Outcome.REACHED
    assert StaysBelow("focus", "plain", ACCURACY, 50)(FOUND).outcome is Outcome.MISSED
    assert BetterBy("focus", "plain", ACCURACY, 20)(FOUND).outcome is Outcome.REACHED
    assert BetterBy("focus", "plain", ACCURACY, 50)(FOUND).outcome is Outcome.MISSED
    assert BetterBy("plain", "focus", ACCURACY)(FOUND).outcome is Outcome.MISSED
    told = Verdict(f"{SAME} of {SAME}", "50.0 of 50.0", "× 1.000 against × 1.000", 10, Outcome.REACHED)
    assert Keeps("focus", "plain", ACCURACY, ACCURACY, 1.0, 1.0)(FOUND) == told
    assert Keeps("focus", "plain", ACCURACY, ACCURACY, 1.01)(FOUND).outcome is Outcome.MISSED
    # Nine rows in 10 steps and one in 100, against 100 each
    found = RatioAtMost("focus", "plain", STEPS, 0.5)(FOUND)
    assert (found.theirs, found.outcome) == ("100.0, 0 of 10 solved", Outcome.REACHED)
    assert found.measured == "× 0.190 [-0.014, 0.394]"
    assert RatioAtMost("focus", "plain", STEPS, 0.18)(FOUND).outcome is Outcome.MISSED


def test_an_interval_that_passes_the_limit_is_not_clear() -> None:
    assert RatioAtMost("focus", "plain", STEPS, 0.3)(FOUND).outcome is Outcome.MEAN_ONLY
    assert StaysBelow("plain", "focus", ACCURACY, 92.5)(FOUND).outcome is Outcome.MEAN_ONLY
    there = accuracy_on("there")
    found = {"focus": {seed: of_tests(train=1.0, there=0.9 + 0.1 * (seed % 3)) for seed in range(6)}}
    assert Keeps("focus", "plain", there, ACCURACY, 0.9, 1.1)(found).outcome is Outcome.REACHED
    assert Keeps("focus", "plain", there, ACCURACY, 0.99, 1.1)(found).outcome is Outcome.MEAN_ONLY
    assert Keeps("focus", "plain", there, ACCURACY, 0.9, 1.05)(found).outcome is Outcome.MEAN_ONLY
    assert Keeps("focus", "plain", there, ACCURACY, 1.01)(found).outcome is Outcome.MISSED
    mixed = {"focus": rows([True] * 6, [0.9, 0.1, 0.9, 0.1, 0.9, 0.9]), "plain": rows([True] * 6, [0.5] * 6)}
    assert BetterBy("focus", "plain", ACCURACY)(mixed).outcome is Outcome.MEAN_ONLY


def test_one_pass_is_told_beside_them() -> None:
    target = Target(1, "question", "much", "recall", RatioAtMost("focus", "plain", STEPS, 0.5))
    assert target.without_iteration(FOUND) == ""
    found = FOUND | {"hybrid": rows([True, False], [0.9, 0.7])}
    assert target.without_iteration(found) == "55.0 [0.000, 626.8], 1 of 2 solved"
    of_accuracy = replace(target, judge=BetterBy("focus", "plain", ACCURACY))
    assert of_accuracy.without_iteration(found).startswith("80.0 [")
    pair = replace(target, one_pass="plain", judge=Keeps("focus", "plain", ACCURACY, ACCURACY, 0.5))
    assert pair.without_iteration(FOUND) == "50.0 of 50.0"


def test_few_seeds_decide_nothing() -> None:
    few = {variant: {seed: FOUND[variant][seed] for seed in range(3)} for variant in FOUND}
    for judge in (
        SolvedShare("focus", "plain", 0.9),
        FewerSolved("focus", "plain"),
        StaysBelow("focus", "plain", ACCURACY, 51),
        BetterBy("focus", "plain", ACCURACY),
        Keeps("focus", "plain", ACCURACY, ACCURACY, 0.5),
        RatioAtMost("focus", "plain", STEPS, 0.5),
    ):
        assert judge(FOUND).outcome is Outcome.REACHED
        assert judge(few).outcome is Outcome.FEW


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.group}: {target.question}")
def test_targets_are_of_groups_that_exist(target: Target) -> None:
    assert target.one_pass in GROUPS[target.group].variants
    # How widely attention is spread is asked of any task
    assert GROUPS[target.group].claim == target.claim or target.claim == 2
    assert target.judge({}) is None
