"""The report page: tables of means, intervals and tests, from the rows in the JSON lines files and nothing else."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .evidence_groups import GROUPS
from .evidence_map import PAGE as MAP
from .evidence_notes import note_on
from .evidence_plan import FIRST_SEED, STEPS, Group, Measure
from .evidence_run import find_record, read_rows
from .evidence_statistics import difference, show
from .evidence_targets import TARGETS, Outcome, Verdict, shown
from .evidence_tasks import find_task
from .evidence_variants import FROM_SCRATCH, VARIANTS

Record = Mapping[str, Any]
CLAIMS = {
    1: "Long range and specificity",
    2: "No collapse of attention",
    3: "Precise identification",
    4: "Hierarchical reasoning",
    5: "Sparsity",
    6: "Language modelling",
}
TITLE = """# Evidence: what FocusA is good for

Small models with and without FocusA, at equal parameters, data, steps and tuning, on a task for each claim. Every
figure in a table is measured by `python scripts/evidence.py`; this page is written from the rows in `results/` by
`python scripts/evidence.py --report`. Notes below tables also tell of tries whose rows are not kept.
"""
_SETTINGS = ", ".join(f"`{name}={value!r}`" for name, value in FROM_SCRATCH.items())
METHOD = f"""## How it was measured

- **FocusA** is what the README says for training from scratch ({_SETTINGS}, else the defaults), with spans and a
  number of iterations that fit the task; the models marked as patched start from the defaults. Encoders feed back
  through the features. These settings were chosen in tries on the k-step lookup. Where the token before matters
  (recall, passkey, needles, ListOps, spans; "short spans" on text), spans are of at most 16 tokens, begin as a third
  of one and end hard, which was chosen on recall and listed names (where the local output also starts at 0.3); on the
  other tasks they begin as half of the longest, with soft ends. Where what is looked for may be farther away than in
  training (recall, passkey, needles), the global branch rotates a quarter of each head (`global_rotation=0.25`),
  which was chosen on recall. Where it stands among more tokens than in training (passkey, needles, max-retrieval),
  the logits of the global branch grow with their number (`global_exponent_start=1`), which was chosen on max-retrieval
  and a single needle; on text at equal FLOPs they grow more slowly (0.5, chosen there). Values were picked on seeds
  that are in no table, but often after those in a table had shown where FocusA lost; the target on the entropy of text
  came together with the setting that reaches it.
- **One pass** is the same layer with `max_iterations=1`: a sliding window beside full attention.
- **Equal**: models of a table have the same number of parameters (± 2%: the MLP is widened to match; "one more layer"
  has more; "four times through the layer" uses one layer's weights four times), read the same examples in the same
  order and make as many steps; decoders have tied embeddings. FocusA computes more: up to `max_iterations` local
  attentions a layer. Where the grid has several learning rates, two as a rule, each model chooses from it on a seed
  that enters no figure (the numbers of two keys: on two); tables of ablations have one rate, which FocusA had been
  tried at. On long texts FocusA was run at the larger rate alone.
- **Equal FLOPs** are those of a training batch's matrix products forward, in an untrained model: masked ones that are
  computed count, and what backward computes again does not. Nor does the rest of the time, which is in the tables.
- **A model that is not solved** may be on a plateau that more steps would leave: a table says what was reached in its
  steps, not what a model can represent. (Three layers can make two look-ups, and in these steps seldom learn to.)
- **Figures** are means over seeds with their 95% interval, [low, high] (Student's t). Each model is compared with the
  baseline of its table seed by seed: the folded tables hold the differences, their intervals, and p, first of the
  paired t test, then of the exact test that turns signs (for n seeds never below 2/2ⁿ).
- **Solved**: every group of questions is answered right in 99%, twice in a row. A row that was never solved enters
  "steps to 99%" with all the steps that it was given, which is too few.
- **Time** is that of the process on all its cores, on a CPU, and the clock's on a GPU; that of "another cpu" is not
  comparable with the others'. FLOPs count no key that a causal query cannot see. Keys read and kept are those of the
  last query of a text of full length.
- **Lost rows stay**. A target is judged from 5 seeds on (shares of seeds from 10 on), by the rule in its line: reached
  where the mean and its whole interval are within it (a difference: the mean, and an interval clear of 0). Ratios have
  Fieller's interval. So many targets are as many tests, and no p is corrected for that.
- **Not measured** yet is what a table says so of: planned models that no row is there of.
- **Pictures**: a dot is a seed, the diamond the mean, the bar its interval, the dashed line the baseline's mean. A
  model has the same colour on the whole page; ablations are grey.
"""
NOT_MEASURED = "not measured"


def counted(group: Group, records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Variant -> seed -> record, of the rows that count in a group and are there."""
    records = list(records)
    rates = group.choose_rates(records)
    # In the order of the seeds, whatever order they were measured in
    seeds = sorted({record["seed"] for record in records if record["seed"] >= FIRST_SEED})
    found = {
        variant: {seed: find_record(group.row(variant, seed, rates[variant]), records) for seed in seeds}
        for variant in group.variants
    }
    return {
        variant: {seed: record for seed, record in rows.items() if record is not None}
        for variant, rows in found.items()
    }


def report(folder: Path, groups: Mapping[str, Group] = GROUPS, note: str = "") -> str:
    """The whole page, in markdown, from the results of `groups` in `folder`, and the map beside it.

    Args:
        note: what a reader must know before all else.
    """
    found = {name: counted(group, read_rows(folder / group.file)) for name, group in groups.items()}
    parts = list(filter(None, [TITLE, note, "## At a glance", summary(found), METHOD]))
    for claim, title in CLAIMS.items():
        mine = [section(group, found[name]) for name, group in groups.items() if group.claim == claim]
        parts += [f"## {claim}. {title}", *(list(filter(None, mine)) or ["Not measured yet."])]
    drawn = folder.parent / MAP
    if drawn.is_file():
        # A level lower, as a part of this page
        parts.append(re.sub("^#", "##", drawn.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary(found: Mapping[str, Mapping[str, Mapping[int, Record]]]) -> str:
    """What was aimed at in the groups of `found` and what became of it, a line a target, and how many were reached."""
    judged = [(target, target.judge(found[target.group])) for target in TARGETS if target.group in found]
    lines, last = [], None
    for target, verdict in judged:
        claim = "" if target.claim == last else f"**{target.claim}. {CLAIMS[target.claim]}**"
        last = target.claim
        alone = target.without_iteration(found[target.group])
        lines.append((claim, target.question, *_judged(verdict), alone, target.wanted, _word(verdict)))
    words = (*(outcome.value for outcome in Outcome), NOT_MEASURED)
    counts = {word: sum(_word(v) == word for _, v in judged) for word in words}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    header = ("claim", "measured", "FocusA", "full attention", "difference", "seeds", "FocusA, one pass", "target", "")
    said = said.replace("**", "")
    return f"{len(judged)} targets: {said}.\n\n" + table(header, lines)


def _judged(verdict: Verdict | None) -> tuple[str, str, str, str]:
    if verdict is None:
        return ("", "", "", "")
    return (verdict.ours, verdict.theirs, verdict.measured, str(verdict.seeds))


def _word(verdict: Verdict | None) -> str:
    return NOT_MEASURED if verdict is None else verdict.outcome.value


def section(group: Group, found: Mapping[str, Mapping[int, Record]]) -> str:
    """One group's picture and tables; a word where nothing can be compared. `found` is what `counted` gives."""
    missing = [VARIANTS[variant].title.removeprefix("… ") for variant, rows in found.items() if not rows]
    found = {variant: rows for variant, rows in found.items() if rows}
    # Another table may share the rows of one model
    if len(found) < 2:
        return f"### {group.title}\n\nNot measured yet."
    lines = [
        f"### {group.title}",
        _setting(group, next(iter(next(iter(found.values())).values()))),
        f"![{group.title}]({group.name}.png)",
        _means(group, found),
        f"Not measured yet: {'; '.join(missing)}." if missing else "",
        note_on(group.name),
        _folded("Sizes, learning rates and time", _models(found)),
        _folded(f"Differences from: {VARIANTS[group.baseline].title}", _differences(group, found)),
    ]
    return "\n\n".join(line for line in lines if line)


def _setting(group: Group, record: Record) -> str:
    """What the rows are, in words."""
    task, sizes = find_task(group.task), record["sizes"]
    settings = [
        f"{name.replace('_', ' ')} {_said(value)}" for name, value in group.settings.items() if value is not None
    ]
    layers = f"{sizes['layers']} layer{'s' if sizes['layers'] > 1 else ''}"
    apart = any("by_group" in measure.where for measure in group.measures)
    return (
        f"{task.title}{' (' + ', '.join(settings) + ')' if settings else ''}. Width {sizes['width']}, {sizes['heads']}"
        f" heads, {layers}; at most {group.steps:,} steps of {group.batch} examples."
        + (f" The number after a test's name: {task.group}." if apart else "")
    )


def _said(value: Any) -> str:
    # A page may be shared, and need not tell where a file lies on this machine
    return Path(value).name if isinstance(value, str) and Path(value).exists() else str(value)


def _means(group: Group, found: Mapping[str, Mapping[int, Record]]) -> str:
    measures = [m for m in group.measures if any(_values(m, rows) for rows in found.values())]
    solvable = STEPS in group.measures
    lines = []
    for variant, rows in found.items():
        solved = sum(record["steps_to_solved"] is not None for record in rows.values())
        cells = [shown(m, _values(m, rows).values()) for m in measures]
        title = VARIANTS[variant].title
        first = f"**{title}**" if variant.startswith("focus") else title
        lines.append((first, str(len(rows)), *([f"{solved}/{len(rows)}"] if solvable else []), *cells))
    return table(("model", "seeds", *(["solved"] if solvable else []), *(m.title for m in measures)), lines)


def _models(found: Mapping[str, Mapping[int, Record]]) -> str:
    lines = []
    for variant, rows in found.items():
        some, seconds = next(iter(rows.values())), sum(record["seconds"] for record in rows.values()) / len(rows)
        devices = ", ".join(sorted({record["device"] for record in rows.values()}))
        lines.append(
            (
                VARIANTS[variant].title,
                f"{some['parameters']:,}",
                f"{some['lr']:g}",
                f"{some['steps']:,}",
                f"{seconds:.0f} ({devices})",
            )
        )
    return table(("model", "parameters", "learning rate", "steps at most", "seconds of training"), lines)


def _differences(group: Group, found: Mapping[str, Mapping[int, Record]]) -> str:
    if group.baseline not in found:
        return ""
    lines = []
    for variant, rows in found.items():
        cells = [_difference(m, rows, found[group.baseline]) for m in group.measures]
        if variant != group.baseline and any(cells):
            lines.append((VARIANTS[variant].title, *cells))
    return table(("model", *(m.title for m in group.measures)), lines) if lines else ""


def _difference(measure: Measure, rows: Mapping[int, Record], baseline: Mapping[int, Record]) -> str:
    """In words: mean and interval of the differences, p of the t test and of the test of signs."""
    ours, theirs = _values(measure, rows), _values(measure, baseline)
    both = sorted(ours.keys() & theirs.keys())
    if len(both) < 2:
        return ""
    change = difference([ours[seed] for seed in both], [theirs[seed] for seed in both])
    tests = [f"{p:.2g}" for p in (change.t_test, change.sign_test) if p is not None]
    return f"{show(change.estimate, signed=True)}; p {', '.join(tests)}" if change.estimate.mean else "0"


def _values(measure: Measure, rows: Mapping[int, Record]) -> dict[int, float]:
    values = {seed: measure.read(record) for seed, record in rows.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
