"""The pictures of an inspection, as matplotlib figures."""

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from .inspection import Inspection
from .inspection_text import measured_layers

WIDTH = 11
INK, SOFT, LINE = "#1d2433", "#5a6478", "#e1e5ee"
# Numbers in more cells than this could not be read
MOST_CELLS = 16


def _figure(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    # The figure without pyplot: nothing global is touched, and no display is needed
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _style(axes: Axes, title: str, xlabel: str = "", ylabel: str = "", grid: bool = False) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(xlabel, color=SOFT)
    axes.set_ylabel(ylabel, color=SOFT)
    axes.tick_params(colors=SOFT, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    if grid:
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)


def _height(layers: int) -> float:
    return min(max(3.2, 1.2 + 0.34 * layers), 11)


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    step = max(len(names) // 32, 1)
    axes.set_yticks(range(0, len(names), step), list(names)[::step])


def _heat(
    axes: Axes, table: np.ndarray, names: Sequence[str], text: str, top: float, low: float = 0, cmap: str = "YlGnBu"
) -> Any:
    """A table as colours, with its numbers where there is room; entries that do not exist stay white."""
    image = axes.imshow(table, vmin=low, vmax=top, cmap=cmap, aspect="auto")
    _label_rows(axes, names)
    step = max(table.shape[1] // MOST_CELLS, 1)
    axes.set_xticks(range(0, table.shape[1], step))
    axes.spines[:].set_visible(False)
    if table.shape[1] <= MOST_CELLS and table.shape[0] <= 2 * MOST_CELLS:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                color = "white" if abs(value) > 0.55 * top else INK
                axes.text(column, row, format(value, text), ha="center", va="center", color=color, fontsize=8)
    return image


def _table(rows: Sequence[Sequence[float]]) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def draw_spans(inspection: Inspection) -> Figure:
    """Mean span of each head, and the spread over the queries."""
    measured = measured_layers(inspection)
    # As far as any head looks: most spans are a small part of the longest
    longest = max(1.0, max(head[-1] for measures in measured.values() for head in measures.span_quantiles))
    figure, (axes,) = _figure(_height(len(measured)), columns=2, width_ratios=(1, 1))
    names = list(measured)
    table = _table([measures.span for measures in measured.values()])
    image = _heat(axes[0], table, names, ".0f" if longest > 20 else ".1f", longest)
    _style(axes[0], "mean span (tokens)", "head", "layer")
    figure.colorbar(image, ax=axes[0], pad=0.02, aspect=30).outline.set_visible(False)
    for number, measures in enumerate(measured.values()):
        heads = len(measures.span_quantiles)
        places = number + (np.arange(heads) - (heads - 1) / 2) * 0.8 / heads
        low, quarter, middle, three_quarters, high = np.array(measures.span_quantiles).T
        width = 26 / max(heads * len(measured) ** 0.5, 8)
        axes[1].hlines(places, low, high, color="#8fb8d0", linewidth=width / 2)
        axes[1].hlines(places, quarter, three_quarters, color="#2a6f97", linewidth=width)
        axes[1].plot(middle, places, "o", color=INK, markersize=max(width * 0.9, 1), linestyle="none")
    _label_rows(axes[1], names)
    axes[1].set_ylim(len(names) - 0.5, -0.5)
    axes[1].set_xlim(0, longest * 1.05)
    _style(axes[1], "spread over the queries, one line a head", "span (tokens)", grid=True)
    return figure


def draw_maps(inspection: Inspection) -> Figure:
    """Attention before and after focus, and the difference, one row a head."""
    maps = inspection.maps
    figure, rows = _figure(3.9 * len(maps), rows=len(maps), columns=3)
    for axes, item in zip(rows, maps, strict=True):
        first, last = np.array(item.first), np.array(item.last)
        # Small weights would be lost among the few large ones
        norm = PowerNorm(0.5, vmin=0, vmax=max(first.max(), last.max()))
        moved = last - first
        reach = max(abs(moved).max(), 1e-6)
        shown = (
            (first, "first attention", {"cmap": "Blues", "norm": norm}),
            (last, "last attention", {"cmap": "Blues", "norm": norm}),
            (moved, f"moved: {item.change:.1%} of the weight", {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}),
        )
        tokens = [_visible(token) for token in item.tokens]
        for number, (axis, (table, title, options)) in enumerate(zip(axes, shown, strict=True)):
            image = axis.imshow(table, aspect="auto", interpolation="nearest", **options)
            axis.set_xticks(range(len(tokens)), tokens, rotation=90)
            axis.set_yticks(range(len(tokens)), tokens if number == 0 else [])
            for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
                label.set_fontsize(6)
                # A dollar sign in a token is no formula
                label.set_parse_math(False)
            _style(axis, title if number else f"{item.layer}, head {item.head}\n{title}")
            axis.spines[:].set_visible(False)
            figure.colorbar(image, ax=axis, pad=0.02, aspect=30).outline.set_visible(False)
    return figure


def _visible(token: str) -> str:
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return shown if len(shown) <= 12 else shown[:11] + "…"


def draw_entropy(inspection: Inspection) -> Figure:
    """Mean entropy of each layer by context length, and the most it can be."""
    measured, bins, max_span = measured_layers(inspection), inspection.context_bins, inspection.settings["max_span"]
    reach = max(max_span if measures.is_causal else 2 * max_span - 1 for measures in measured.values())
    figure, ((axes,),) = _figure(4)
    axes.plot(bins, [log(min(n, reach)) for n in bins], "--", color=SOFT, linewidth=1.2, label="uniform")
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(measured)))
    for color, (name, measures) in zip(colors, measured.items(), strict=True):
        points = [(n, e) for n, e in zip(bins, measures.entropy_by_context, strict=True) if e is not None]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, linewidth=1.6, label=f"layer {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(bins, [str(n) for n in bins])
    axes.set_ylim(bottom=0)
    _style(axes, "entropy of the last local attention", "context, up to (tokens)", "nats", grid=True)
    figure.legend(frameon=False, fontsize=8, ncols=len(measured) // 20 + 1, loc="outside right upper")
    return figure


def _stack(axes: Axes, shares: np.ndarray, names: Sequence[str], labels: Sequence[str]) -> None:
    left = np.zeros(len(names))
    colors = colormaps["YlGnBu"](np.linspace(0.25, 0.95, shares.shape[1]))
    for color, column, label in zip(colors, shares.T, labels, strict=True):
        axes.barh(range(len(names)), column, left=left, color=color, label=label, height=0.72)
        left += column
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _label_rows(axes, names)


def draw_iterations(inspection: Inspection) -> Figure:
    """How many attentions queries make, and what each contributes to the output."""
    measured = measured_layers(inspection)
    read = {name: measures for name, measures in measured.items() if measures.readout is not None}
    figure, (axes,) = _figure(_height(len(measured)) + 0.3, columns=2 if read else 1)
    counts = np.array([measures.iteration_counts for measures in measured.values()], dtype=float)
    _stack(axes[0], counts / counts.sum(axis=1, keepdims=True), list(measured), range(1, counts.shape[1] + 1))
    _style(axes[0], "attentions made, share of the queries", ylabel="layer")
    if read:
        shares = np.array([np.mean(measures.readout, axis=0) for measures in read.values()])
        _stack(axes[1], shares, list(read), range(1, shares.shape[1] + 1))
        _style(axes[1], "share of each iterate in the output")
    # The same colours in both
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, ncols=min(counts.shape[1], 16), loc="outside lower center")
    return figure


def draw_refiner(inspection: Inspection) -> Figure:
    """How often each action is taken, and the mean of the table for it."""
    measured = measured_layers(inspection)
    values = [layer.refiner.action_values for layer in inspection.layers if layer.refiner and layer.measures]
    figure, (axes,) = _figure(_height(len(measured)), columns=2)
    counts = _table([measures.action_counts for measures in measured.values()])
    worth, names = _table(values), list(measured)
    top = max(abs(worth).max(), 1e-6)
    _heat(axes[0], 100 * counts / counts.sum(axis=1, keepdims=True), names, ".0f", 100)
    _heat(axes[1], worth, names, ".2f", top, low=-top, cmap="RdBu_r")
    step = max(counts.shape[1] // MOST_CELLS, 1)
    for axis, title in zip(axes, ("queries (%)", "mean of the table (Q)"), strict=True):
        places = range(0, counts.shape[1], step)
        axis.set_xticks(places, [f"{action / (counts.shape[1] - 1):.2f}" for action in places])
        _style(axis, title, "span multiplied by", "layer")
    return figure
