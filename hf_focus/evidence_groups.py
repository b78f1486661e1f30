"""The tables of the evidence, claim by claim, and the presets. A new table is a new entry."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Generator

from .errors import FocusConfigError, bad_value
from .evidence_plan import ACCURACY, EXACT, FLOPS, GRID, KEPT, KEYS, LOCAL_KEYS, STEPS, Group, Measure, accuracy_on
from .evidence_tasks import find_task

DEPTHS = ("focus", "hybrid", "not rotated", "not normalized", "plain", "plain +1", "plain +2")
BASELINES = ("focus", "plain", "hybrid", "adaptive span", "log-n", "plain +1")
# Where what is looked for may be farther away than in training
FAR_BASELINES = ("focus", "plain", "plain, quarter rotated", "plain, last unrotated", *BASELINES[2:])
# And among more tokens
AMONG_MORE_VARIANTS = ("focus", "global flat", *FAR_BASELINES[1:])
# What each part adds, where a model is small and quickly solved; and the parts that matter most, where it is not
SCREENED = (
    "focus", "1 iteration", "2 iterations", "10 iterations", "refiner", "refiner of the seed", "refiner of the loss",
    "static span", "fixed span", "long span", "last", "through features", "through keys", "additive", "of the seed",
    "anchored", "full start", "even start", "read-out from both", "local start 0",
    "bias 2", "no stop", "relative stop", "seed temperature", "fixed temperature", "focus rate 3",
)  # fmt: skip
MAIN_PARTS = (
    "focus", "1 iteration", "2 iterations", "10 iterations", "last", "additive", "not rotated", "not normalized",
)  # fmt: skip
BITS = Measure("bits per byte, held out", ("results", "held out", "bits_per_byte"), lower_is_better=True)
LONG_BITS = Measure(
    "bits per byte, 4 times the length", ("results", "held out, 4 L", "bits_per_byte"), lower_is_better=True
)
LONG_CONTEXT_BITS = Measure(
    "bits per byte, held out, 8k", ("results", "held out, 8k", "bits_per_byte"), lower_is_better=True
)
CACHE = Measure("cache, KiB", ("cost", "cache_bytes"), lower_is_better=True, scale=1 / 1024)
RUNNING = (
    KEYS,
    CACHE,
    Measure("µs a token, prefill", ("cost", "prefill_seconds"), lower_is_better=True, scale=1e6),
    Measure("ms a token, decoding", ("cost", "decode_seconds"), lower_is_better=True, scale=1e3),
    FLOPS,
    KEPT,
    Measure("effective tokens", ("cost", "effective_tokens"), lower_is_better=True),
    Measure("local effective tokens", ("cost", "local_effective_tokens"), lower_is_better=True),
    Measure("weights > 0.001, %", ("cost", "attended"), lower_is_better=True, scale=100),
)
F1 = Measure("F1, %", ("results", "train", "f1"), scale=100)
BOUNDARIES = Measure("boundary errors a span", ("results", "train", "boundary_errors_per_span"), lower_is_better=True)
HELD_OUT_F1 = Measure("F1 held out, %", ("results", "held out", "f1"), scale=100)
HELD_OUT_BOUNDARIES = Measure(
    "boundary errors a span, held out", ("results", "held out", "boundary_errors_per_span"), lower_is_better=True
)
TWO_LAYERS = {"layers": 2}
TEXT_SIZES = {"layers": 2, "width": 128, "heads": 4}
LONGER = tuple(accuracy_on(f"{times} L") for times in (2, 4, 8))


def exact_on(test: str) -> Measure:
    """Share of a test set's examples with every answer right."""
    return Measure(f"{test}: all right, %", ("results", test, "exact"), scale=100)


def entropy_on(test: str, branch: str = "") -> Measure:
    """Entropy / log n of the attention of what is asked on a test set: of the global branch, or of the "local" one."""
    where = ("results", test, "spread", f"{branch}_entropy_share".lstrip("_"))
    return Measure(f"{branch} entropy / log n, {test}".lstrip(), where, lower_is_better=True)


def _k_step(name: str, largest: int, variants: tuple[str, ...], title: str, **changes: Any) -> Group:
    by_k = tuple(accuracy_on("train", k) for k in range(1, largest + 1))
    return Group(
        name=name,
        claim=4,
        title=title,
        task="k-step",
        settings={"steps": largest},
        variants=variants,
        measures=(ACCURACY, STEPS, *by_k),
        **{"rates": (1e-3, 2e-3), "steps": 3000, "until_solved": True, **changes},
    )


def _tuned(name: str, claim: int, title: str, task: str, measures: tuple[Measure, ...], **changes: Any) -> Group:
    """All baselines, two layers, learning rates from the grid."""
    defaults = {"variants": BASELINES, "sizes": TWO_LAYERS, "rates": GRID, "steps": 2000}
    return Group(name=name, claim=claim, title=title, task=task, measures=measures, **{**defaults, **changes})


_LENGTHS = tuple(exact_on(f"{times} L") for times in (2, 8, 16, 32))
_NEEDLE_SPREAD = (
    *(entropy_on(test, branch) for branch in ("", "local") for test in ("train", "16 L")),
    *(Measure(f"rank residual, {test}", ("results", test, "spread", "rank_residual")) for test in ("train", "16 L")),
)

_TEXT_SPREAD = tuple(entropy_on(test) for test in ("held out", "held out, 4 L"))


def _needles(
    task: str, asked: str, claim: int = 3, steps: int = 1000, spread: tuple[Measure, ...] = (), **changes: Any
) -> Group:
    """A variant of the needles: examples with every answer right, as the context grows."""
    return _tuned(
        task.replace(" ", "-"),
        claim,
        f"Needles: {asked}",
        task,
        (EXACT, STEPS, *_LENGTHS, *spread),
        **{"variants": AMONG_MORE_VARIANTS, "batch": 32, "steps": steps, "chosen_by": (EXACT, STEPS), **changes},
    )


GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        _tuned("recall", 1, "Multi-query recall, trained at L = 64", "recall", (ACCURACY, STEPS, *LONGER,
               accuracy_on("4 pairs"), accuracy_on("16 pairs"), *(accuracy_on("8 L", d) for d in (4, 32, 128, 256))),
               batch=32, chosen_by=(STEPS, ACCURACY),
               variants=("focus", "global rotated", "global still", "soft spans, not rotated", *FAR_BASELINES[1:])),
        _tuned("passkey", 1, "Passkey, trained at L = 64", "passkey",
               (EXACT, STEPS, *(exact_on(f"{times} L") for times in (2, 4, 8))), variants=AMONG_MORE_VARIANTS,
               batch=32, steps=1000, chosen_by=(EXACT, STEPS)),
        _tuned("max-retrieval", 2, "Max-retrieval, trained at n ≤ 16", "max-retrieval",
               (*(accuracy_on(str(n)) for n in (16, 64, 256, 1024, 4096)), ACCURACY, *(entropy_on(str(n), branch)
               for branch in ("", "local") for n in (16, 256, 4096))), sizes={},
               variants=("focus", "global flat", "exponent 0", *BASELINES[1:])),
        _needles("needle", "a single needle, while the context grows 32 times", claim=2, spread=_NEEDLE_SPREAD),
        _needles("multi-key needles", "one of four needles"),
        _needles("multi-value needles", "both numbers of a key, in order", steps=2000, variants=BASELINES),
        _needles("multi-query needles", "the numbers of two keys", tuning_seeds=2, variants=BASELINES),
        _tuned("entity-spans", 3, "Spans of listed names in synthetic text", "entity spans", (F1, BOUNDARIES),
               settings={"length": 64, "names": 2, "longest": 2}, batch=32, steps=1000),
        _tuned("source-spans", 3, "Spans of strings and comments in real text", "source spans",
               (HELD_OUT_F1, HELD_OUT_BOUNDARIES), settings={"length": 128}, batch=16, steps=600),
        _k_step("k-step-3", 3, (*DEPTHS, "plain, normalized", "plain, 4 rounds"),
                "k-step lookup, k ≤ 3, one layer against one to three", seeds=10),
        _k_step("k-step-5", 5, DEPTHS, "k-step lookup, k ≤ 5, one layer against one to three", seeds=10),
        _k_step("k-step-8", 8, ("focus", "plain", "plain +2"),
                "k-step lookup, k ≤ 8, two layers against two to four", sizes=TWO_LAYERS),
        _k_step("k-step-3-ablations", 3, SCREENED, "k-step lookup, k ≤ 3: what each part adds", baseline="focus",
                rates=(2e-3,)),
        _k_step("k-step-5-ablations", 5, MAIN_PARTS, "k-step lookup, k ≤ 5: what each part adds", baseline="focus",
                rates=(2e-3,)),
        _k_step("k-step-3-baselines", 3, BASELINES, "k-step lookup, k ≤ 3: all baselines"),
        _tuned("dyck", 4, "Dyck-(4, 5)", "dyck",
               (ACCURACY, *(accuracy_on("train", d) for d in (0, 8, 24)), accuracy_on("4 L")), steps=1000),
        _tuned("listops", 4, "ListOps, up to 64 tokens", "listops",
               (ACCURACY, *(accuracy_on("train", d) for d in (1, 2, 3, 4)), accuracy_on("2 L")), batch=32, steps=1000),
        _tuned("sparsity", 5, "Real text at 8,192 bytes of context", "long text", (LONG_CONTEXT_BITS, *RUNNING),
               variants=("focus, near", "focus, near, not rotated", "plain", "hybrid, near", "adaptive span"),
               batch=4, steps=400, examples=32),
        _tuned("text-equal-flops", 6, "Language modelling from scratch, equal training FLOPs", "text",
               (BITS, LONG_BITS, FLOPS, *_TEXT_SPREAD), sizes=TEXT_SIZES, batch=8, steps=400,
               variants=("focus, short", "plain", "hybrid, short", *BASELINES[3:]), equal_flops=True),
        _tuned("text-patched", 6, "A pretrained model, trained further with and without FocusA, equal steps (the"
               " patch adds its parameters)", "text", (BITS, LONG_BITS, FLOPS, LOCAL_KEYS), sizes=TEXT_SIZES, batch=8,
               rates=(1e-3,),
               variants=("focus, patched", "refiner, patched", "refiner of the seed, patched", "static span, patched",
                         "soft spans, patched", "soft spans, refiner, patched", "not rotated, patched", "plain",
                         "hybrid, patched"),
               pretrain=400, steps=400),
        _tuned("text-patched-equal-flops", 6, "A pretrained model, trained further with and without FocusA, equal"
               " training FLOPs (the patch adds its parameters)", "text", (BITS, LONG_BITS, FLOPS), sizes=TEXT_SIZES,
               batch=8, variants=("focus, patched", "plain", "hybrid, patched"), pretrain=400, steps=400,
               equal_flops=True),
    )
}  # fmt: skip
_SMALL = {"variants": ("focus", "plain"), "rates": (3e-3,), "seeds": 1, "batch": 32, "examples": 64}
# Under ten minutes on two cores: whether everything works, and a first look; too short and too few seeds to decide
QUICK: dict[str, Group] = {
    name: replace(GROUPS[name], **{**_SMALL, **changes})
    for name, changes in {
        "recall": {"steps": 250},
        "max-retrieval": {"steps": 250, "seeds": 2},
        "entity-spans": {"steps": 80},
        "k-step-3": {"steps": 600, "seeds": 2},
        "dyck": {"steps": 150},
        "sparsity": {"steps": 20, "batch": 2, "examples": 4, "variants": ("focus, near", "plain")},
        "text-equal-flops": {"variants": ("focus, short", "plain"), "steps": 40, "batch": 8, "examples": 16},
    }.items()
}


def find_groups(names: Sequence[str], groups: Mapping[str, Group] = GROUPS) -> list[Group]:
    """Groups by name; `"all"` stands for all of them.

    Raises:
        FocusConfigError: there is none of this name.
    """
    found: dict[str, Group] = {}
    for name in names:
        if name != "all" and name not in groups:
            raise FocusConfigError(bad_value("groups", name, ", ".join(("all", *groups))))
        found |= groups if name == "all" else {name: groups[name]}
    return list(found.values())


def on_dataset(groups: Mapping[str, Group], dataset: str, **settings: str | None) -> dict[str, Group]:
    """The groups whose task reads text, with another text: a data set or file, see `evidence_tasks_text.text`.

    Args:
        settings: dataset_config and text_column, where they are needed.

    Raises:
        FocusDataError: the data set is not found, or too short for the longest windows of a test.
    """
    chosen, found = {"dataset": dataset, **settings}, {}
    for name, group in groups.items():
        task = find_task(group.task)
        if "dataset" in task.settings:
            found[name] = replace(group, settings={**group.settings, **chosen})
            for test in ({}, *task.tests.values()):
                # Now, and not after hours of training
                task.batch(1, Generator(), {**found[name].settings, **test})
    return found
