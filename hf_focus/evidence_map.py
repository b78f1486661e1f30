"""A map of what FocusA does: pictures of a small model that was trained on real text, and the page they are on."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .evidence_train import Row, train
from .evidence_variants import Sizes
from .inspection import attention_weights, inspect_model, observe_problems
from .stdlib_text import is_held_out, stdlib_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "MAP.md"
# A name that comes again, so that there is something to find
SENTENCE = "for name in names: print(name)"
TEXTS, TOKENS = 8, 256
# A few minutes on two cores
ROW = Row("text", "refiner", sizes={"layers": 2, "width": 64, "heads": 4}, lr=3e-3, steps=800, batch=8, examples=16)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, whose id is the byte: what the models of the evidence read."""
    printable = pre_tokenizers.ByteLevel.alphabet()
    # The alphabet stands for bytes in the order of GPT-2: those that can be printed as themselves, then the others
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = shown + [byte for byte in range(256) if byte not in shown]
    characters = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    assert set(characters) == set(printable)
    vocabulary = dict(zip(characters, order, strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def iteration_weights(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Local attention of every layer after each iteration: name -> (iterations, H, T, S).

    A query that has stopped keeps its last attention.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, problem: Any, record: Any) -> None:
        each = [
            attention_weights(problem, torch.minimum(record.iterations - 1, torch.full_like(record.iterations, n)))[0]
            for n in range(problem.max_iterations)
        ]
        found[name] = torch.stack(each).cpu()

    was_training = model.training
    model.eval()
    with torch.no_grad(), observe_problems(model, keep):
        model(input_ids=ids.to(model.device), use_cache=False)
    model.train(was_training)
    return found


def moved(weights: Tensor) -> Tensor:
    """Share of each head's attention that is elsewhere after the last iteration than after the first, means over the
    queries: (iterations, H, T, S) -> (H,)."""
    return (weights[-1] - weights[0]).abs().sum(-1).mean(-1) / 2


def draw_attention(weights: dict[str, Tensor], tokens: list[str]) -> "Figure":
    """A row a layer, its head that moves most; a column an iteration. weights: as `iteration_weights` gives them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    iterations = max(found.shape[0] for found in weights.values())
    figure = Figure(figsize=(3 * iterations, 3.2 * len(weights)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, found) in zip(
        figure.subplots(len(weights), iterations, squeeze=False), weights.items(), strict=True
    ):
        shares = moved(found)
        head = int(shares.argmax())
        for number, axes in enumerate(row):
            # The root, as small weights would be lost among the few large ones
            axes.imshow(found[number, head].float().sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"iteration {number + 1}", fontsize=10, loc="left")
            axes.set_xticks(range(len(tokens)), tokens, fontsize=6.5, family="monospace")
            axes.set_yticks(range(len(tokens)), tokens, fontsize=6.5, family="monospace")
            axes.tick_params(length=0, pad=1)
            axes.spines[:].set_visible(False)
        row[0].set_title(
            f"{name.removesuffix('.self_attn')}, head {head}: {shares[head]:.0%} of its weight moves\niteration 1",
            fontsize=10,
            loc="left",
        )
    return figure


CAPTIONS = {
    "spans": "How far the heads look. Left: mean span of each head, in bytes. Right: the spread over the bytes of the"
    " text: dot the median, thick line the middle half, thin line 90%. A long line is a span that depends on the"
    " byte.",
    "entropy": "How sharp the last local attention is, by the number of bytes that there were to see. The dashed line"
    " is attention to all of the span alike; far below it, a few bytes get all the weight, however many there are.",
    "iterations": "How many attentions the queries make before their output stops changing, and how much each of them"
    " adds to what is read out.",
    "refiner": "The refiner's table. Left: how often it chooses each correction of the span. Right: what it has"
    " learned that each is worth, means over the states that it has been in.",
}


def write_map(
    output: Path, row: Row = ROW, device: str = "cpu", progress: Callable[[str], None] | None = None
) -> Path:
    """Train the model of `row`, a row of text, and write the page with its pictures. Needs matplotlib.

    Returns:
        The page.
    """
    return draw_map(train(row, device, progress)[0], output, row)


def draw_map(model: PreTrainedModel, output: Path, row: Row) -> Path:
    """The page of a model that reads bytes, see `write_map`."""
    from .inspection_pictures import draw_entropy, draw_iterations, draw_refiner, draw_spans

    texts = [text for name, text in stdlib_files() if is_held_out(name)][:TEXTS]
    found = inspect_model(model, byte_tokenizer(), texts, max_tokens=TOKENS, num_maps=0)
    draws = {"spans": draw_spans, "iterations": draw_iterations, "entropy": draw_entropy}
    if model.focus_config.refiner:
        draws["refiner"] = draw_refiner
    output.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(**row.sizes)
    lines = [
        "# A map of what FocusA does",
        f"Inside a Llama that reads bytes: {sizes.layers} layers of {sizes.heads} heads, {model.num_parameters():,}"
        f" parameters, trained for {row.steps:,} steps on the source of Python's standard library (seed {row.seed}),"
        f" measured on {found.tokens:,} bytes of other files. `python scripts/evidence.py --map` makes this page.",
    ]
    ids = torch.tensor([list(SENTENCE.encode())])
    _save(draw_attention(iteration_weights(model, ids), list(SENTENCE)), output / "map-attention.png")
    lines.append(
        f"## Attention after each iteration\n\nThe local attention on `{SENTENCE}`: a row is the byte that asks, a"
        " column a byte that it sees, darker is more weight (its root is drawn). Of each layer the head whose"
        " attention moves most is shown. A query that has stopped keeps its last attention.\n\n"
        "![Attention after each iteration](map-attention.png)"
    )
    for name, draw in draws.items():
        _save(draw(found), output / f"map-{name}.png")
        lines.append(f"## {name.capitalize()}\n\n{CAPTIONS[name]}\n\n![{name}](map-{name}.png)")
    refiners = [(layer.name, layer.refiner) for layer in found.layers if layer.refiner is not None]
    rows = [
        f"| {name} | {r.updates:,} | {r.states_visited:,} of 10,000 | {r.mean_change:.3f} | {r.largest_change:.3f} |"
        for name, r in refiners
    ]
    if rows:
        header = ["| layer | updates | states visited | mean change of an entry | largest |", "| --- " * 5 + "|"]
        lines.append("\n".join([*header, *rows]))
    page = output / PAGE
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return page


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=90)
