"""The report page: tables of means, intervals and tests, from the rows in the JSON lines files and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .evidence_groups import GROUPS, QUICK
from .evidence_plan import TUNING_SEEDS, Group, Measure
from .evidence_run import is_done, read_rows
from .evidence_statistics import Difference, Estimate, difference, estimate
from .evidence_targets import TARGETS
from .evidence_tasks import find_task
from .evidence_variants import VARIANTS

Record = Mapping[str, Any]
CLAIMS = {
    1: "Long range and specificity",
    2: "No collapse of attention",
    3: "Precise identification",
    4: "Hierarchical reasoning",
    5: "Sparsity",
    6: "Language modelling",
}
INTRODUCTION = """# Evidence

Figures that `python scripts/evidence.py` measures; `python scripts/evidence.py --report` writes this page from the
files in `results/`. A table compares models with equal parameters (± 2%, the MLP is widened to match; the deeper
baselines have more), equal data, steps and tuning. A cell is the mean over seeds with its 95% interval (Student's t).
Below a table: each model against the baseline, paired by seed, with the p-values of the t test and of the exact test
that turns signs (for n seeds never below 2/2ⁿ). Rows that lost stay. "Solved": every group at 99% or more. A row that
was never solved enters the mean of "steps to 99%" with the steps that it was given, which is too few.
"""


def counted(group: Group, records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Variant -> seed -> record, of the rows that count in a group and are there."""
    records = list(records)
    rates = group.choose_rates(records)
    found: dict[str, dict[int, Record]] = {variant: {} for variant in group.variants}
    for record in records:
        variant, seed = record["variant"], record["seed"]
        known = variant in found and seed not in TUNING_SEEDS
        if known and is_done(group.row(variant, seed, rates[variant]), [record]):
            found[variant][seed] = record
    return found


def report(folder: Path) -> str:
    """The whole page, in markdown, from the results in `folder`."""
    groups = [*GROUPS.values(), *QUICK]
    parts = [INTRODUCTION, "## Targets", targets(folder)]
    for claim, title in CLAIMS.items():
        sections = [
            text
            for group in groups
            if group.claim == claim and (text := section(group, read_rows(folder / group.file)))
        ]
        parts += [f"## {claim}. {title}", *(sections or ["Not measured yet."])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def targets(folder: Path) -> str:
    """What was aimed at, and what became of it."""
    words = {True: "reached", False: "**not reached**", None: "too few seeds to say"}
    lines = []
    for target in TARGETS:
        group = GROUPS[target.group]
        verdict = target.judge(counted(group, read_rows(folder / group.file)))
        said = ("", "not measured") if verdict is None else (verdict.measured, words[verdict.reached])
        lines.append((str(target.claim), f"{group.title}: {target.wanted}", *said))
    return table(("claim", "target", "measured", ""), lines)


def section(group: Group, records: Sequence[Record]) -> str:
    """One group's tables; empty without rows."""
    found = {variant: rows for variant, rows in counted(group, records).items() if rows}
    if not found:
        return ""
    sizes = next(iter(next(iter(found.values())).values()))["sizes"]
    lines = [
        f"### {group.title}",
        f"{find_task(group.task).title}. {group.settings or 'Default settings'}; width {sizes['width']},"
        f" {sizes['heads']} heads, {sizes['layers']} layer{'s' if sizes['layers'] > 1 else ''} (and those that a model"
        f" has more); at most {group.steps} steps of {group.batch} examples.",
        _means(group, found),
        _differences(group, found),
    ]
    picture = f"{group.name}.png"
    lines.append(f"![{group.title}]({picture})")
    return "\n\n".join(line for line in lines if line)


def _means(group: Group, found: Mapping[str, Mapping[int, Record]]) -> str:
    measures = [m for m in group.measures if any(_values(m, rows) for rows in found.values())]
    header = ("model", "parameters", "lr", "seeds", "solved", *(m.title for m in measures), "seconds")
    lines = []
    for variant, rows in found.items():
        solved = sum(record["steps_to_solved"] is not None for record in rows.values())
        some = next(iter(rows.values()))
        cells = [_show(estimate(list(values))) if (values := _values(m, rows).values()) else "" for m in measures]
        seconds = sum(record["seconds"] for record in rows.values()) / len(rows)
        lines.append(
            (
                VARIANTS[variant].title,
                f"{some['parameters']:,}",
                f"{some['lr']:g}",
                str(len(rows)),
                f"{solved}/{len(rows)}",
                *cells,
                f"{seconds:.0f}",
            )
        )
    return table(header, lines)


def _differences(group: Group, found: Mapping[str, Mapping[int, Record]]) -> str:
    if group.baseline not in found:
        return ""
    lines = []
    for variant, rows in found.items():
        for measure in group.measures:
            ours, theirs = _values(measure, rows), _values(measure, found[group.baseline])
            both = sorted(ours.keys() & theirs.keys())
            if variant != group.baseline and len(both) > 1:
                change = difference([ours[seed] for seed in both], [theirs[seed] for seed in both])
                title = f"{VARIANTS[variant].title}: {measure.title}"
                lines.append((title, str(len(both)), _show(change.estimate, signed=True), *_p(change)))
    header = (f"minus {VARIANTS[group.baseline].title}", "seeds", "difference", "p (t)", "p (signs)")
    return table(header, lines) if lines else ""


def _values(measure: Measure, rows: Mapping[int, Record]) -> dict[int, float]:
    values = {seed: measure.read(record) for seed, record in rows.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _p(change: Difference) -> tuple[str, str]:
    return tuple("" if p is None else f"{p:.3g}" for p in (change.t_test, change.sign_test))


def _show(found: Estimate, signed: bool = False) -> str:
    def text(value: float, sign: str = "+" if signed else "") -> str:
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
        return f"{value:{sign}.{digits}f}"

    interval = "" if found.low is None else f" [{text(found.low)}, {text(found.high)}]"
    return text(found.mean) + interval


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
