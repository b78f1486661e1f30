"""An inspection as one HTML page that needs nothing else. Needs matplotlib (`pip install hf_focus[plots]`)."""

import warnings
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined

from .inspection import Inspection, LayerMeasures
from .inspection_text import COLUMNS, changed_settings, facts, is_silent, layer_table, measured_layers

# The policy forbids the browser every request; without an icon of its own a page would make one
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }} – FocusA</title>
<style>
  :root { color-scheme: light; --ink: #1d2433; --soft: #5a6478; --line: #e1e5ee; --accent: #2a6f97; }
  * { box-sizing: border-box; }
  body { margin: 0; background: #f4f6fa; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
  main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
  h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
  h2 { margin: 0 0 6px; font-size: 19px; }
  p { margin: 0 0 14px; color: var(--soft); max-width: 80ch; }
  .source { margin: 2px 0 22px; overflow-wrap: anywhere; }
  section { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
    margin: 0 0 18px; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 12px; margin: 0 0 18px; }
  .tile { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
  .tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; color: var(--accent); }
  .tile span { color: var(--soft); font-size: 13px; line-height: 1.35; display: block; }
  .note { border-left: 4px solid #d08c2f; background: #fdf6ea; }
  .note p { margin: 0; color: var(--ink); }
  img { display: block; width: 100%; height: auto; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; width: 100%; }
  th, td { padding: 5px 4px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th { color: var(--soft); font-weight: 600; }
  th:first-child, td:first-child { text-align: left; }
  tr.changed td { font-weight: 600; color: var(--accent); }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; font-size: 13px; margin: 14px 0 0; }
  dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
  summary { cursor: pointer; font-weight: 600; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="source">{{ source }}</p>
<div class="tiles">
{% for value, meaning in tiles %}<div class="tile"><b>{{ value }}</b><span>{{ meaning }}</span></div>
{% endfor %}</div>
{% if silent %}<section class="note"><p><b>FocusA is silent.</b> No layer lets its local branch into the output
yet: the model computes exactly what it did before it was patched. The pictures show what an untrained branch does.</p>
</section>
{% endif %}
{% for picture in pictures %}<section>
<h2>{{ picture.title }}</h2>
<p>{{ picture.text }}</p>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}">
</section>
{% endfor %}
<section>
<h2>Layers</h2>
<p>One row a layer; numbers are means over its heads and all tokens.</p>
<div class="scroll"><table>
<tr>{% for column in columns %}<th title="{{ column.meaning }}">{{ column.name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<dl>{% for column in columns %}<dt>{{ column.name }}</dt><dd>{{ column.meaning }}</dd>{% endfor %}</dl>
</section>
<section>
<details><summary>Settings (those that are not the defaults in colour)</summary>
<table>{% for name, value in settings.items() %}
<tr{% if name in changed %} class="changed"{% endif %}><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></details>
</section>
<section>
<h2>The model</h2>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</section>
</main>
</body>
</html>
"""


# Title -> function of inspection_pictures, and what it shows
PICTURES = {
    "Span per layer and head": (
        "draw_spans",
        "How far the local branch looks back (or, in an encoder, to both sides). Left: the mean span of every"
        " head. Right: how it varies from token to token: the thin line holds 90% of the queries, the thick one"
        " half of them, the dot is the median. Before training all spans are equal.",
    ),
    "Local attention before and after focus": (
        "draw_maps",
        "The heads whose attention focus changes most, on the first tokens of the text. Each row is a query, each"
        " column a key, dark is much weight. Left: the first attention, made with the model's own query. Middle:"
        " the last, after the output was fed back into the query. Right: what moved: red gained, blue lost.",
    ),
    "Entropy by context length": (
        "draw_entropy",
        "How widely the local attention is spread, against how much a query could see. The dashed line is the"
        " most it can be, all keys within reach weighed alike. An attention that stays concentrated in long"
        " contexts stays low on the right.",
    ),
    "Iterations and read-out": (
        "draw_iterations",
        "Left: how many attentions queries make before their output stops changing. Right: the share of each"
        " iterate in the output, mean over heads and tokens.",
    ),
    "The refiner": (
        "draw_refiner",
        "Left: how often the refiner multiplies the predicted span by each factor. Right: what its table has"
        " learned each factor to be worth, mean over the states that it has met; all zero before training, when"
        " the last factor, 1, means no correction.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """A picture of the page: heading, what it shows and how to read it, PNG in base64."""

    title: str
    text: str
    data: str


def render_page(inspection: Inspection, source: str = "") -> str:
    """The page as HTML: pictures inside, no script, nothing loaded from anywhere.

    Args:
        inspection: what to show; without measures there are no pictures.
        source: a line under the title: which model it was, and which text.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=inspection.model_class,
        source=source,
        tiles=_tiles(inspection),
        silent=is_silent(inspection),
        pictures=_pictures(inspection),
        columns=COLUMNS,
        rows=layer_table(inspection),
        settings=inspection.settings,
        changed=changed_settings(inspection),
        facts=facts(inspection),
    )


def _tiles(inspection: Inspection) -> list[tuple[str, str]]:
    def mean(read: Callable[[LayerMeasures], Sequence[float]]) -> float:
        return fmean(value for measures in measured.values() for value in read(measures))

    share = inspection.focus_parameters / max(inspection.base_parameters, 1)
    tiles = [
        (_short(inspection.base_parameters), "parameters of the model"),
        (_short(inspection.focus_parameters), f"parameters of FocusA, {share:.1%} of the model's"),
        (f"{len(inspection.layers)} / {inspection.layers_in_model}", "attention layers with FocusA"),
    ]
    measured = measured_layers(inspection)
    if measured:
        tiles += [
            (f"{mean(lambda m: m.span):.1f}", f"mean span in tokens, of at most {inspection.settings['max_span']}"),
            (f"{mean(lambda m: m.effective_keys):.1f}", "keys that a query's attention is spread over, exp(entropy)"),
            (f"{1 - mean(lambda m: m.kept):.0%}", "of the keys in the span get next to no weight (sparsity)"),
            (
                f"{mean(lambda m: m.iterations):.2f}",
                f"attentions a query makes, of at most {inspection.settings['max_iterations']}",
            ),
        ]
    return tiles


def _short(number: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _pictures(inspection: Inspection) -> list[Picture]:
    # Here, because matplotlib is an extra
    from . import inspection_pictures

    if not measured_layers(inspection):
        return []
    return [
        Picture(title, text, _png(getattr(inspection_pictures, draw)(inspection)))
        for title, (draw, text) in PICTURES.items()
        if draw != "draw_refiner" or inspection.settings["refiner"]
    ]


def _png(figure: Any) -> str:
    buffer = BytesIO()
    with warnings.catch_warnings():
        # Tokens of scripts that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=120)
    return b64encode(buffer.getvalue()).decode()
