"""Pictures of the evidence, from the rows. Needs matplotlib (`hf_focus[plots]`)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .evidence_plan import STEPS, Group, Measure
from .evidence_statistics import estimate
from .evidence_tasks import find_task
from .evidence_variants import VARIANTS

Rows = Mapping[int, Mapping[str, Any]]
# Told apart by colour-blind readers too (Okabe and Ito); a model has the same colour everywhere, ablations are grey
COLORS = {
    "focus": "#0072B2",
    "focus, near": "#0072B2",
    "plain": "#D55E00",
    "plain +1": "#E69F00",
    "plain +2": "#000000",
    "hybrid": "#009E73",
    "hybrid, near": "#009E73",
    "adaptive span": "#CC79A7",
    "log-n": "#56B4E9",
}
GREY, INK, LINE = "#767676", "#1d2433", "#e1e5ee"
# More lines than these in a panel could not be followed
MOST_LINES = 8
# Panels at most
MOST_PANELS = 4
# Values further apart than this factor are drawn on a logarithmic axis
WIDE = 20
# Ends of where in a record a share of right answers stands
SHARES = {"accuracy", "exact"}


def plot_group(path: Path, group: Group, found: Mapping[str, Rows]) -> None:
    """A dot a seed, and the mean with its 95% interval, of each model; the learning curves, where the task can be
    solved; and the profile over lengths or depths, where there is one. The models' names are the rows of the first
    panel, their colours those of the lines.

    Args:
        path: of the PNG.
        found: what `evidence_report.counted` gives.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [variant for variant in group.variants if found.get(variant)]
    profile = profile_of(group)
    singles = [m for m in group.measures if m not in profile or m is group.measures[0]]
    singles = [m for m in singles if any(_values(m, found[v]) for v in shown)]
    lines = len(shown) <= MOST_LINES
    panels = [("curves", None)] if lines and STEPS in group.measures else []
    panels += [("profile", None)] if lines and profile else []
    panels = [*(("dots", m) for m in singles[: MOST_PANELS - len(panels)]), *panels]
    figure = Figure(figsize=(3 + 2.8 * len(panels), max(2.4, 0.9 + 0.3 * len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axis, (kind, measure)) in enumerate(zip(axes, panels, strict=True)):
        if kind == "dots":
            _dots(axis, measure, found, shown, group.baseline, named=number == 0)
        elif kind == "curves":
            _curves(axis, found, shown)
        else:
            _profile(axis, profile, found, shown)
            axis.set_xlabel(find_task(group.task).group if "by_group" in profile[0].where else "test set", fontsize=8)
            axis.xaxis.label.set_color(GREY)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(LINE)
        axis.grid(color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=90)


def profile_of(group: Group) -> list[Measure]:
    """The shares of right answers, by step, distance or depth, or by test set, where there are enough for a line."""
    grouped = [m for m in group.measures if "by_group" in m.where]
    tested = [m for m in group.measures if m.where[-1] in SHARES]
    return next((measures for measures in (grouped, tested) if len(measures) > 2), [])


def _color(variant: str) -> str:
    return COLORS.get(variant, GREY)


def _values(measure: Measure, rows: Rows) -> list[float]:
    return [value for record in rows.values() if (value := measure.read(record)) is not None]


def _dots(
    axis: Any, measure: Measure, found: Mapping[str, Rows], shown: Sequence[str], baseline: str, named: bool
) -> None:
    for place, variant in enumerate(shown):
        values = _values(measure, found[variant])
        if not values:
            continue
        color, mean = _color(variant), estimate(values)
        # Below the bar, which would hide them
        axis.plot(values, [place + 0.22] * len(values), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
        if mean.low is not None:
            low, high = measure.clip(mean.low), measure.clip(mean.high)
            axis.hlines(place, low, high, color=color, linewidth=2)
        axis.plot(mean.mean, place, "D", color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.7)
        if variant == baseline:
            axis.axvline(mean.mean, color=color, linewidth=0.9, linestyle="--", zorder=0)
    every = [value for variant in shown for value in _values(measure, found[variant])]
    if min(every) > 0 and max(every) > WIDE * min(every):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.xaxis.set_minor_formatter("")
    better = "less is better" if measure.lower_is_better else "more is better"
    axis.set_title(measure.title, fontsize=9, color=INK, loc="left")
    axis.set_xlabel(better, fontsize=8, color=GREY)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_yticks(range(len(shown)), [VARIANTS[v].title for v in shown] if named else [""] * len(shown))
    for label, variant in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_color(_color(variant))


def _curves(axis: Any, found: Mapping[str, Rows], shown: Sequence[str]) -> None:
    for variant in shown:
        curves = [dict(record["curve"]) for record in found[variant].values()]
        for curve in curves:
            axis.plot(list(curve), [100 * y for y in curve.values()], color=_color(variant), alpha=0.3, linewidth=0.8)
        steps = sorted({step for curve in curves for step in curve})
        # A row that stopped once it was solved stays solved
        middle = [100 * median(curve.get(step, curve[max(curve)]) for curve in curves if curve) for step in steps]
        axis.plot(steps, middle, color=_color(variant), linewidth=2)
    axis.set_title("worst group in training, %", fontsize=9, color=INK, loc="left")
    axis.set_xlabel("step; thick: median of the seeds", fontsize=8, color=GREY)
    axis.set_ylim(0, 102)


def _profile(axis: Any, profile: Sequence[Measure], found: Mapping[str, Rows], shown: Sequence[str]) -> None:
    names = [m.where[-1] if "by_group" in m.where else m.where[1].replace("train", "trained on") for m in profile]
    # No line from one kind of test set to another, such as from longer texts to more pairs
    kinds = [name.rstrip("0123456789").split(" ")[-1] for name in names]
    breaks = [n for n in range(2, len(names)) if kinds[n] != kinds[n - 1]]
    joined = list(pairwise([0, *breaks, len(names)]))
    for variant in shown:
        means = [(place, values) for place, m in enumerate(profile) if (values := _values(m, found[variant]))]
        middle = {place: sum(values) / len(values) for place, values in means}
        for start, end in joined:
            line = {place: mean for place, mean in middle.items() if start <= place < end}
            axis.plot(list(line), list(line.values()), "o-", color=_color(variant), linewidth=1.8, markersize=4)
        for place, values in means:
            axis.plot([place] * len(values), values, ".", color=_color(variant), alpha=0.3, markersize=4)
    axis.set_title("right, %", fontsize=9, color=INK, loc="left")
    axis.set_ylim(0, 102)
    axis.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
