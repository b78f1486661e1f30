"""A map of what FocusA does: pictures of a small model that was trained on real text, and the page they are on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .evidence_train import Row, train
from .inspection import attention_weights, inspect_model, observe_problems
from .stdlib_text import is_held_out, stdlib_files

PAGE = "MAP.md"
SENTENCE = "def write_text(self, data, encoding=None):"
TEXTS, TOKENS = 8, 256
ROW = Row("text", "focus", sizes={"layers": 2, "width": 128, "heads": 4}, lr=1e-3, steps=2000, batch=16)


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


def draw_iterations_on(weights: Tensor, tokens: list[str], title: str) -> Any:
    """One layer's attention on a sentence: a row a head, a column an iteration. weights: (iterations, H, T, S)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    iterations, heads = weights.shape[:2]
    figure = Figure(figsize=(2.6 * iterations, 2.6 * heads), layout="constrained")
    FigureCanvasAgg(figure)
    for head, row in enumerate(figure.subplots(heads, iterations, squeeze=False)):
        for number, axes in enumerate(row):
            # The root, as small weights would be lost among the few large ones
            axes.imshow(weights[number, head].float().sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"head {head}, iteration {number + 1}", fontsize=7)
            axes.set_xticks([])
            axes.set_yticks(range(len(tokens)), tokens if number == 0 else [""] * len(tokens), fontsize=4)
    figure.suptitle(title, fontsize=9)
    return figure


def write_map(
    output: Path, row: Row = ROW, device: str = "cpu", progress: Callable[[str], None] | None = None
) -> Path:
    """Train the model of `row`, a row of text, and write the page with its pictures. Needs matplotlib.

    Returns:
        The page.
    """
    from .inspection_pictures import draw_entropy, draw_iterations, draw_refiner, draw_spans

    model = train(row, device, progress)[0]
    tokenizer = byte_tokenizer()
    texts = [text for name, text in stdlib_files() if is_held_out(name)][:TEXTS]
    found = inspect_model(model, tokenizer, texts, max_tokens=TOKENS, num_maps=0)
    pictures = {"spans": draw_spans, "entropy": draw_entropy, "iterations": draw_iterations}
    if model.focus_config.refiner:
        pictures["refiner"] = draw_refiner
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        "# A map of what FocusA does",
        f"A byte-level Llama of {model.num_parameters():,} parameters, {row.sizes}, trained for {row.steps} steps of"
        f" {row.batch} windows of the standard library's source (seed {row.seed}, learning rate {row.lr:g}), measured"
        f" on {found.tokens:,} bytes of held-out files. `python scripts/evidence.py --map` makes this page.",
    ]
    for name, draw in pictures.items():
        draw(found).savefig(output / f"map-{name}.png", dpi=70)
        lines.append(f"## {name.capitalize()}\n\n![{name}](map-{name}.png)")
    ids = torch.tensor([list(SENTENCE.encode())])
    lines.append(f"## Attention after each iteration\n\n`{SENTENCE}`, a row a query, the root of each weight.")
    for number, (name, weights) in enumerate(iteration_weights(model, ids).items()):
        picture = f"map-attention-{number}.png"
        draw_iterations_on(weights, list(SENTENCE), name).savefig(output / picture, dpi=70)
        lines.append(f"![{name}]({picture})")
    refiners = [(layer.name, layer.refiner) for layer in found.layers if layer.refiner is not None]
    if refiners:
        lines.append("## The refiner's table")
        header = "| layer | updates | states visited | mean of the table for each action, span × 0 … × 1 |"
        rows = [
            f"| {name} | {r.updates} | {r.states_visited:,} | {', '.join(f'{v:.3f}' for v in r.action_values)} |"
            for name, r in refiners
        ]
        lines.append("\n".join([header, "| --- | --- | --- | --- |", *rows]))
    page = output / PAGE
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return page
