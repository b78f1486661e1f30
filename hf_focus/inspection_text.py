"""The facts and the table of an inspection as words and numbers, for the terminal and for the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from .configuration import FocusConfig
from .inspection import NEGLIGIBLE, Inspection, LayerMeasures, LayerReport

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the table of layers: its name, what it means, and how a layer's entry is made."""

    name: str
    meaning: str
    value: Callable[[LayerReport], str]


def _mean(digits: int, read: Callable[[LayerMeasures], Sequence[float]]) -> Callable[[LayerReport], str]:
    def value(layer: LayerReport) -> str:
        return NOTHING if layer.measures is None else f"{fmean(read(layer.measures)):.{digits}f}"

    return value


def _span_range(layer: LayerReport) -> str:
    if layer.measures is None:
        return NOTHING
    low, high = (fmean(head[end] for head in layer.measures.span_quantiles) for end in (0, -1))
    return f"{low:.0f}–{high:.0f}"


def _favourite(layer: LayerReport) -> str:
    counts = layer.measures.action_counts if layer.measures else None
    if not counts:
        return NOTHING
    action = max(range(len(counts)), key=lambda number: counts[number])
    return f"×{action / (len(counts) - 1):.2f} ({counts[action] / sum(counts):.0%})"


def _refiner(read: Callable[[LayerReport], str]) -> Callable[[LayerReport], str]:
    return lambda layer: NOTHING if layer.refiner is None else read(layer)


COLUMNS = (
    Column("layer", "where in the model", lambda layer: layer.name),
    Column("heads", "attention heads", lambda layer: str(layer.heads)),
    Column("weights", "parameters of FocusA", lambda layer: f"{layer.parameters:,}"),
    Column(
        "join",
        "size (root mean square) of the weights that join the local branch in; 0: it does not speak yet",
        lambda layer: f"{layer.join_size:.1e}",
    ),
    Column("span", "mean span, in tokens", _mean(1, lambda m: m.span)),
    Column("5–95%", "the span of most queries", _span_range),
    Column("entropy", "of the last local attention, in nats", _mean(2, lambda m: m.entropy)),
    Column(
        "eff. keys",
        "exp(entropy), mean: among how many keys the attention is spread",
        _mean(1, lambda m: m.effective_keys),
    ),
    Column(
        "coverage",
        "share of the keys in the span whose weight is above coverage_threshold",
        _mean(2, lambda m: m.coverage),
    ),
    Column(
        f">{NEGLIGIBLE:g}",
        f"share of the keys in the span whose weight is above {NEGLIGIBLE:g}; the rest is sparsity",
        _mean(2, lambda m: m.kept),
    ),
    Column("iterations", "attentions that a query makes, mean", _mean(2, lambda m: m.iterations)),
    Column("τ", "temperature, mean", _mean(2, lambda m: m.temperature)),
    Column("action", "the refiner's most frequent correction of the span, and how frequent it is", _favourite),
    Column("updates", "steps the refiner has learned", _refiner(lambda layer: f"{layer.refiner.updates:,}")),
    Column("states", "states it has learned about", _refiner(lambda layer: f"{layer.refiner.states_visited:,}")),
    Column(
        "|Q|",
        "mean size of the table's entries that moved",
        _refiner(lambda layer: f"{layer.refiner.mean_change:.3f}"),
    ),
)


def layer_table(inspection: Inspection) -> list[list[str]]:
    """Rows of the table of layers, in the order of `COLUMNS`."""
    return [[column.value(layer) for column in COLUMNS] for layer in inspection.layers]


def measured_layers(inspection: Inspection) -> dict[str, LayerMeasures]:
    """What the layers did, by their short names; layers that no text reached are left out."""
    names = short_names([layer.name for layer in inspection.layers])
    pairs = zip(names, inspection.layers, strict=True)
    return {name: layer.measures for name, layer in pairs if layer.measures is not None}


def facts(inspection: Inspection) -> dict[str, str]:
    """The model in a few lines, by name."""
    share = inspection.focus_parameters / max(inspection.base_parameters, 1)
    found = {
        "model": f"{inspection.model_class} ({inspection.model_type})",
        "base": f"{inspection.base_parameters:,} parameters",
        "FocusA": f"{inspection.focus_parameters:,} parameters ({share:.1%} of the base's)",
        "buffers": f"{inspection.buffer_bytes / 1e6:.1f} MB (the refiners' tables)",
        "layers": f"{len(inspection.layers)} of {inspection.layers_in_model} patched",
        "measured": f"on {inspection.texts} texts, {inspection.tokens:,} tokens" if inspection.texts else "nothing",
    }
    if is_silent(inspection):
        found["note"] = "FocusA is silent: the outputs are those of the model without it"
    return found


def is_silent(inspection: Inspection) -> bool:
    """Whether no layer's local branch reaches the output, as before any training."""
    return all(layer.join_size == 0 for layer in inspection.layers)


def changed_settings(inspection: Inspection) -> dict[str, object]:
    """The settings that are not the defaults."""
    defaults = FocusConfig()
    values = inspection.settings
    return {f.name: values[f.name] for f in fields(defaults) if values[f.name] != getattr(defaults, f.name)}


def to_text(inspection: Inspection) -> str:
    """The inspection for a terminal."""
    settings = ", ".join(f"{name}={value!r}" for name, value in changed_settings(inspection).items())
    lines = {**facts(inspection), "settings": settings or "the defaults"}
    width = max(map(len, lines))
    rows = [[column.name for column in COLUMNS], *layer_table(inspection)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        [
            *(f"{name:{width}}  {value}" for name, value in lines.items()),
            "",
            # Names to the left, numbers to the right
            *(
                f"{row[0]:{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
                for row in rows
            ),
        ]
    )


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the parts that all of them share: `model.layers.0.self_attn` -> `0`."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) != 1:
        return list(names)
    differing = [column for column in zip(*split, strict=True) if len(set(column)) > 1]
    if not differing:
        # A single layer: its number says enough
        return [next((part for part in reversed(split[0]) if part.isdigit()), names[0])]
    return [".".join(parts) for parts in zip(*differing, strict=True)]
