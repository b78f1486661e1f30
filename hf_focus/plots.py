"""Pictures of runs and of what FocusA learned. Needs matplotlib (`pip install hf_focus[plots]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .recording import FocusRecords

# Fixed: making room for every label takes as long as drawing does
MARGINS = {"left": 0.07, "right": 0.97, "bottom": 0.14, "top": 0.91, "wspace": 0.18}


def mean_spans(records: FocusRecords) -> dict[str, Tensor]:
    """Mean span in tokens of every head: layer name -> (H,) float32. Padding is left out."""
    spans = {}
    for layer in records:
        total, count = torch.zeros(()), torch.zeros(())
        for call in records[layer]:
            valid = call.valid[:, None].expand_as(call.span).float()
            total = total + (call.span.float() * valid).sum(dim=(0, 2))
            count = count + valid.sum(dim=(0, 2))
        spans[layer] = total / count.clamp_min(1)
    return spans


def plot_run(path: Path, logs: Mapping[str, Sequence[dict[str, Any]]], spans: Mapping[str, Tensor]) -> None:
    """Draw the losses of some runs beside the spans that one of them learned.

    Args:
        path: of the picture; its suffix gives the format.
        logs: name of the run -> the lines of its train_log.jsonl.
        spans: layer -> mean span of each head in tokens, as `mean_spans` gives them.
    """
    # The figure without pyplot: nothing global is touched, and no display is needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    FigureCanvasAgg(figure)
    losses, heat = figure.subplots(1, 2, width_ratios=(3, 2), gridspec_kw=MARGINS)
    for number, (name, lines) in enumerate(logs.items()):
        steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        losses.plot(*zip(*steps, strict=True), color=f"C{number}", alpha=0.5, label=f"{name}, training")
        held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
        if held_out:
            losses.plot(*zip(*held_out, strict=True), color=f"C{number}", marker="o", label=f"{name}, held out")
    losses.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    losses.legend()
    table = torch.stack(list(spans.values())).numpy()
    image = heat.imshow(table, vmin=0, vmax=max(1.0, table.max()), cmap="viridis", aspect="auto")
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            heat.text(column, row, f"{value:.1f}", ha="center", va="center", color="white")
    heat.set(xlabel="head", ylabel="layer", title="Mean span on held-out text (tokens)")
    heat.set_xticks(range(table.shape[1]))
    heat.set_yticks(range(table.shape[0]))
    figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=130)
