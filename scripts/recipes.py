"""The recipes of fine-tuning side by side, on a small model trained here: what each reaches, trains and takes.

A small Llama is trained on the Python standard library, to stand for a pretrained model. Every recipe then gets the
same steps on other files of it. The first recipes add FocusA to full attention; the others convert the model to
attention that looks `--max-dist` tokens back, whose cache is bounded, beside a sliding window whose cache is as large.
Rows are kept in --output-dir, recipes that are there are not run again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from quickstart import make_base, title
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_focus import FocusConfig
from hf_focus.arguments import parse_arguments
from hf_focus.stdlib_text import write_stdlib_corpus
from hf_focus.training import FinetuneResult, finetune

FOCUS = {"max_span": 32, "max_iterations": 2}
# Tokens that a bounded cache keeps before the one that is decoded: the sinks, and what either branch looks back
SINKS = FocusConfig().sink_tokens
WINDOW = "sliding window with the same cache"
FROZEN = {"freeze_base": True}
LORA = {"lora_rank": 8}


def recipes(max_dist: int, rate: float) -> dict[str, list[dict[str, Any]]]:
    """Name -> its stages, each with the share of the steps it gets."""
    focus_rate, fast = {"focus_learning_rate": 3 * rate}, {"focus_learning_rate": 10 * rate}
    alone, far = {**FOCUS, **FROZEN, **focus_rate}, {"max_dist": max_dist}
    whole = {**FOCUS, **focus_rate}
    match = {**alone, **far, "objective": "match", "share": 0.5}
    # What a first stage patched keeps its settings
    then = {"share": 0.5, **focus_rate}
    return {
        "plain, all weights": [{"focus": False}],
        "FocusA alone": [alone],
        "FocusA alone, 10 x learning rate": [{**alone, **fast}],
        "FocusA and LoRA": [{**whole, **LORA, "learning_rate": 3 * rate}],
        "FocusA and all weights": [whole],
        "FocusA and all weights, one learning rate": [FOCUS],
        "FocusA and all weights, 10 x learning rate": [{**FOCUS, **fast}],
        "FocusA and all weights, feedback through the layer": [{**whole, "feedback_through": "layer"}],
        f"{WINDOW}, all weights": [{"focus": False}],
        "bounded, FocusA alone": [{**alone, **far}],
        "bounded, FocusA and all weights": [{**whole, **far}],
        "bounded, matched, then FocusA alone": [match, {**then, **FROZEN}],
        "bounded, matched, then all weights": [match, then],
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--pretrain-steps", type=int, default=160)
    parser.add_argument("--steps", type=int, default=80, help="of each recipe, both stages together")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256, help="tokens of an example")
    parser.add_argument("--eval-bytes", type=int, default=60_000, help="of held-out text")
    parser.add_argument("--max-dist", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the base")
    parser.add_argument(
        "--warmup-share", type=float, default=0.25, help="of the steps; a new optimizer's first are rough"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    return parser.parse_args(argv)


def train(settings: dict[str, Any]) -> FinetuneResult:
    """Fine-tune in this process, with the flags of scripts/finetune.py by their names."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    model, data, training, focus = parse_arguments(flags)
    # As on the command line: without settings of FocusA, those of a model that carries it stay
    return finetune(model, data, training, focus)


def make_window(base: Path, folder: Path, size: int) -> None:
    """Save the model in `base`, a Llama, as the Mistral with the same weights whose tokens see the last `size`."""
    plain = LlamaForCausalLM.from_pretrained(base)
    settings = {name: value for name, value in plain.config.to_dict().items() if name != "model_type"}
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=size))
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def run(name: str, stages: list[dict[str, Any]], common: dict[str, Any], out: Path, steps: int) -> dict[str, Any]:
    """Run the stages, each from what the one before saved; return the row of the table."""
    row: dict[str, Any] = {"recipe": name, "seconds": 0.0, "trained": 0}
    start = out / ("window" if name.startswith(WINDOW) else "pretrained")
    for number, stage in enumerate(stages):
        stage = dict(stage)
        share = stage.pop("share", 1)
        folder = out / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
        settings = {**common, **stage, "model_name_or_path": start, "output_dir": folder}
        result = train({**settings, "max_steps": round(steps * share), "eval_at_start": number == 0})
        scored = [line["eval_bits_per_byte"] for line in result.log if "eval_bits_per_byte" in line]
        row.setdefault("before", scored[0])
        row |= {"after": scored[-1], "seconds": row["seconds"] + result.seconds}
        trained = (folder / "README.md").read_text().partition("of which ")[2].partition(" were trained")[0]
        row["trained"] = max(row["trained"], int(trained.replace(",", "")))
        start = folder
    return row


def main(argv: list[str]) -> None:
    args = parse(argv)
    out, tokens = args.output_dir, args.batch_size * args.block_size
    sizes = {"pretrain": 4 * tokens * args.pretrain_steps, "train": 4 * tokens * args.steps, "eval": args.eval_bytes}
    files = write_stdlib_corpus(out / "text", sizes)
    common = {
        "eval_files": files["eval"],
        "cpu": True,
        "cache_dir": out / "cache",
        "text_column": "text",
        "block_size": args.block_size,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "overwrite_output_dir": True,
    }
    if not (out / "pretrained" / "config.json").is_file():
        title("A small Llama, trained to stand for a pretrained model")
        make_base(out / "untrained", files["pretrain"], args.seed)
        train(
            {
                **common,
                "model_name_or_path": out / "untrained",
                "train_files": files["pretrain"],
                "output_dir": out / "pretrained",
                "focus": False,
                "max_steps": args.pretrain_steps,
                "learning_rate": 2e-3,
            }
        )
    make_window(out / "pretrained", out / "window", SINKS + max(args.max_dist, FOCUS["max_span"]))
    common |= {"train_files": files["train"], "learning_rate": args.learning_rate, "warmup_share": args.warmup_share}
    table = out / "recipes.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()] if table.is_file() else []
    done = {row["recipe"] for row in rows}
    for name, stages in recipes(args.max_dist, args.learning_rate).items():
        if name in done or (args.only and name not in args.only):
            continue
        title(name)
        rows.append(run(name, stages, common, out, args.steps))
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    title("Held-out bits per byte, same data, steps and seed")
    print("| recipe | before | after | parameters trained | seconds |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        figures = f"{row['before']:.4f} | {row['after']:.4f} | {row['trained']:,} | {row['seconds']:.0f}"
        print(f"| {row['recipe']} | {figures} |")


if __name__ == "__main__":
    main(sys.argv[1:])
