"""Pictures of the evidence, from the rows. Needs matplotlib (`hf_focus[plots]`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evidence_plan import Group
from .evidence_variants import VARIANTS


def plot_group(path: Path, group: Group, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Least accuracy of a group against steps, a line a seed; and accuracy by group, a point a seed.

    Args:
        path: of the PNG.
        found: what `evidence_report.counted` gives.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, groups = figure.subplots(1, 2)
    shown = [variant for variant in group.variants if found.get(variant)]
    for number, variant in enumerate(shown):
        color = f"C{number % 10}"
        for record in found[variant].values():
            curves.plot(*zip(*record["curve"], strict=True), color=color, alpha=0.5, linewidth=0.8)
            by_group = record["results"]["train"]["by_group"]
            places = [int(key) + 0.6 * (number - (len(shown) - 1) / 2) / len(shown) for key in by_group]
            groups.plot(places, list(by_group.values()), ".", color=color, markersize=3)
        curves.plot([], [], color=color, label=VARIANTS[variant].title)
    curves.set(xlabel="step", ylabel="accuracy, worst group", ylim=(0, 1.02))
    groups.set(xlabel="group", ylabel="accuracy", ylim=(0, 1.02))
    curves.legend(fontsize=5)
    figure.suptitle(group.title, fontsize=9)
    figure.savefig(path, dpi=90)
