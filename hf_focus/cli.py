"""The command `hf-focus`: patch, unpatch, fine-tune, evaluate, inspect and push models from a shell."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from inspect import cleandoc
from math import isfinite
from typing import Any

from .errors import FocusConfigError, FocusError, FocusInterruptedError, bad_value

PROGRAM = "hf-focus"
# The last is EX_TEMPFAIL of sysexits.h: the same command may succeed later
OK, UNEXPECTED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75
DESCRIPTION = """
FocusA attention for Hugging Face transformers, from a shell.

    hf-focus patch Qwen/Qwen3-0.6B qwen3-focus --max-span 128
    hf-focus finetune --model-name-or-path qwen3-focus --train-files book.txt --output-dir out
    hf-focus evaluate out --eval-files held-out.txt
    hf-focus inspect out --html out.html
    hf-focus push out me/qwen3-focus --private

MODEL is always an id on the Hub or a folder. `hf-focus COMMAND --help` explains a command and its flags.
"""
EPILOG = """
Exit status: 0 done; 2 bad input, with `hf-focus COMMAND: message` on stderr; 1 anything unexpected, with a traceback;
75 ended from outside (SIGTERM, or another process of the run is gone): the same command with --resume latest goes on.
Results go to stdout, progress and messages to stderr.
"""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Texts as they were written, and the default behind every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser(name: str, groups: Sequence[type] = ()) -> Any:
    """A parser for a command, with a flag for each field of the dataclasses `groups`."""
    from transformers import HfArgumentParser

    return HfArgumentParser(
        groups,
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {COMMANDS[name].usage}",
        description=cleandoc(COMMANDS[name].run.__doc__),
        epilog=EPILOG,
        formatter_class=_Help,
    )


def _parse(parser: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """One object for each group of the parser, then the rest of the arguments."""
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="id on the Hub, or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the Hub")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; appears whole or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a model's folder or empty")
    parser.add_argument(
        "--auto-class",
        help="class of transformers to load MODEL with, such as AutoModelForCausalLM. Default: the one that saved it",
    )


def _convert(args: argparse.Namespace, change: Callable[[Any], Any]) -> Any:
    """Load MODEL, change it, write it to OUT with what belongs to it."""
    from .folders import copy_companions, load_model, written_beside

    with written_beside(args.out, args.overwrite) as folder:
        model = load_model(args.model, args.auto_class, args.revision, args.trust_remote_code)
        model = change(model)
        model.save_pretrained(folder)
        copy_companions(args.model, folder, args.revision)
    return model


def patch(argv: Sequence[str]) -> None:
    """Add FocusA to the self-attention of MODEL and write the result to OUT.

    The new model computes exactly what MODEL does until it is trained, but with settings for models that are trained
    from scratch (--local-start, --global-exponent-start, --global-rotation). Weights keep their dtype; tokenizer,
    processor and generation settings are copied. Every setting of FocusA is a flag.

        hf-focus patch Qwen/Qwen3-0.6B qwen3-focus --max-span 128 --layers 0 1 2 3
        hf-focus patch google-bert/bert-base-uncased bert-focus --auto-class AutoModelForMaskedLM
    """
    from .arguments import FocusArguments
    from .patching import apply_focus

    parser = _parser("patch", [FocusArguments])
    _add_conversion(parser)
    focus, args = _parse(parser, argv)
    # Before anything is loaded
    config = focus.to_config()
    model = _convert(args, lambda loaded: apply_focus(loaded, config))
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if ".focus." in name)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, of which {own:,} of FocusA\n{args.out}")


def unpatch(argv: Sequence[str]) -> None:
    """Take FocusA off MODEL and write the plain model to OUT: its own class, config and attention.

    What training changed in the base's weights stays; FocusA's weights are dropped.

        hf-focus unpatch qwen3-focus qwen3
    """
    from .patching import remove_focus

    parser = _parser("unpatch")
    _add_conversion(parser)
    (args,) = _parse(parser, argv)
    model = _convert(args, remove_focus)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters\n{args.out}")


def finetune(argv: Sequence[str]) -> None:
    """Fine-tune a model with FocusA attention (or, with --no-focus, without) on any text.

        hf-focus finetune --model-name-or-path Qwen/Qwen3-0.6B --train-files book.txt --output-dir out
        hf-focus finetune run.yaml --learning-rate 1e-4       # settings from a file; flags win over it
        torchrun --nproc_per_node 2 -m hf_focus.cli finetune run.yaml --num-processes 2

    Data: --dataset NAME from the Hub, or --train-files with local .txt, .json, .jsonl, .csv or .parquet files. Without
    evaluation data of its own a share of the training data is held out (--eval-share).
    What is trained: everything; --freeze-base trains FocusA alone; --lora-rank N gives the base LoRA.
    --output-dir then holds the model (from_pretrained loads it), its model card, train_log.jsonl, the trackers' files
    and, with --save-steps N, checkpoints; --resume latest goes on from the last one.
    """
    from accelerate import PartialState

    from .arguments import parse_arguments
    from .training import finetune as run

    try:
        arguments = parse_arguments(argv, description=cleandoc(finetune.__doc__), prog=f"{PROGRAM} finetune")
    except FocusError:
        raise
    except ValueError as error:
        # HfArgumentParser's way to say that a flag does not exist
        raise FocusConfigError(str(error)) from error
    result = run(*arguments)
    if PartialState().is_main_process:
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()) or "no evaluation data"
        print(f"{result.steps} steps, {result.seconds:.1f} s in this call\n{metrics}\n{result.output_dir}")
        if result.url:
            print(result.url)


def evaluate(argv: Sequence[str]) -> None:
    """Print the metrics of MODEL, with FocusA or without: those that fine-tuning reports, computed alike.

    Data: --eval-files; or --dataset with its --eval-split; or what fine-tuning with the same data flags and --seed
    would hold out; with --claims alone, source files of Python's standard library. Of a model with FocusA also the
    mean span, entropy, coverage and iterations, on the first batch.

        hf-focus evaluate out --eval-files held-out.txt
        hf-focus evaluate out --train-files book.txt --json   # the share that fine-tuning held out with this seed
        hf-focus evaluate out --claims                        # bits per byte, spread of attention, rank, passkeys
        hf-focus evaluate textattack/bert-base-uncased-imdb --task sequence-classification \\
            --dataset stanfordnlp/imdb --eval-split test --max-eval-examples 1000
    """
    from .arguments import DataArguments, ModelArguments
    from .claims import meaning
    from .scoring import evaluate_saved
    from .scoring_claims import evaluate_claims
    from .tasks import TASKS

    parser = _parser("evaluate", [DataArguments])
    _add_model(parser)
    parser.add_argument("--task", default="causal-lm", choices=list(TASKS), help="what the model is for")
    parser.add_argument("--tokenizer", help="tokenizer id or folder. Default: the model's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="type of the weights")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out share, and of what masked-lm masks")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even where there is a GPU")
    parser.add_argument("--claims", action="store_true", help="also what `hf_focus.claims` measures, as claim_…")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    data, args = _parse(parser, argv)
    if args.batch_size < 1:
        raise FocusConfigError(bad_value("batch_size", args.batch_size, "an int >= 1"))
    model_args = ModelArguments(
        args.model,
        revision=args.revision,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
    )
    metrics = {}
    if not args.claims or data.eval_files or data.dataset or data.train_files:
        metrics = evaluate_saved(
            model_args,
            data,
            args.task,
            batch_size=args.batch_size,
            seed=args.seed,
            cpu=args.cpu,
            show_progress=True,
        )
    if args.claims:
        metrics |= evaluate_claims(model_args, data, args.task, args.cpu, show_progress=True)
    if args.json:
        # JSON has no infinity
        print(json.dumps({name: value if isfinite(value) else None for name, value in metrics.items()}))
    else:
        for name, value in metrics.items():
            told = f"  ({meaning(name.removeprefix('claim_'))})" if name.startswith("claim_") else ""
            print(f"{name} {value:.6g}{told}")


def inspect(argv: Sequence[str]) -> None:
    """Show what FocusA is and does in MODEL: parameters, layers, spans, sparsity, iterations, the refiner's actions.

    It is measured on --text files, on the data that evaluation would use, or, with neither, on source files of
    Python's standard library: the first --block-size tokens of --max-eval-examples texts (default 8). A model without
    a tokenizer is described, and not measured.

        hf-focus inspect out
        hf-focus inspect out --text README.md --json
        hf-focus inspect out --dataset roneneldan/TinyStories --eval-split validation --html out.html

    --html writes one page that needs nothing else, with pictures: span per layer and head, attention before and after
    focus, entropy by context length, iterations, the refiner.
    """
    import torch

    from .arguments import DataArguments
    from .folders import load_model, write_text_beside
    from .inspection import inspect_model
    from .inspection_data import choose_texts, without_folders
    from .inspection_text import to_text

    parser = _parser("inspect", [DataArguments])
    _add_model(parser)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text files of any kind to measure on")
    parser.add_argument("--map-tokens", type=int, default=32, help="tokens of the attention maps")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even where there is a GPU")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--html", metavar="FILE", help="write a page with pictures (needs matplotlib)")
    data, args = _parse(parser, argv)
    if args.map_tokens < 1:
        raise FocusConfigError(bad_value("map_tokens", args.map_tokens, "an int >= 1"))
    if args.html and find_spec("matplotlib") is None:
        raise FocusConfigError(bad_value("html", args.html, "None, or matplotlib installed (pip install matplotlib)"))
    texts, described = choose_texts(args.text, data)
    model = load_model(args.model, None, args.revision, args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    tokenizer, size = _tokenizer(args, data, model)
    found = inspect_model(model, tokenizer, texts, max_tokens=size, map_tokens=args.map_tokens, show_progress=True)
    if args.json:
        print(json.dumps(found.to_dict()))
    elif args.html:
        from .inspection_page import render_page

        name = without_folders(args.model)
        source = f"{name}, measured on {described}" if found.texts else f"{name}, not measured"
        write_text_beside(args.html, render_page(found, source))
        print(args.html)
    else:
        print(to_text(found))


def _tokenizer(args: argparse.Namespace, data: Any, model: Any) -> tuple[Any, int]:
    """The model's tokenizer, None if it has none, and how many tokens a text may have."""
    from .arguments import ModelArguments
    from .preparation import find_block_size, find_source
    from .task_types import Source

    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = find_source(ModelArguments(args.model, **options)).tokenizer
    except FocusConfigError as error:
        print(f"{PROGRAM} inspect: nothing is measured, for lack of a tokenizer: {error}", file=sys.stderr)
        return None, 0
    return tokenizer, find_block_size(data.block_size, Source(model.config, tokenizer))


def push(argv: Sequence[str]) -> None:
    """Upload the model in FOLDER to the Hub as REPO_ID, which is made if it does not exist.

    The token is the one that `hf auth login` or HF_TOKEN gives.

        hf-focus push out me/qwen3-focus --private
    """
    from .sharing import push_folder

    parser = _parser("push")
    parser.add_argument("folder", metavar="FOLDER", help="folder of a saved model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.add_argument("--revision", help="branch to upload to. Default: main")
    parser.add_argument("--commit-message", help="of the commit on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, if that is another model")
    (args,) = _parse(parser, argv)
    print(push_folder(**vars(args)))


@dataclass(frozen=True)
class Command:
    """One command: what `hf-focus --help` says of it, its usage, and the function that takes its arguments.

    The function's docstring is the description in `hf-focus COMMAND --help`.
    """

    summary: str
    usage: str
    run: Callable[[Sequence[str]], None] = field(repr=False)


# A new command is a new entry
COMMANDS = {
    "patch": Command("add FocusA to a model", "MODEL OUT [--flags]", patch),
    "unpatch": Command("take FocusA off a model", "MODEL OUT [--flags]", unpatch),
    "finetune": Command("train a model on text", "[run.yaml or run.json] [--flags]", finetune),
    "evaluate": Command("print a model's metrics on data", "MODEL [--flags]", evaluate),
    "inspect": Command("show what FocusA does in a model", "MODEL [--flags]", inspect),
    "push": Command("upload a model to the Hub", "FOLDER REPO_ID [--flags]", push),
}


def _run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version('hf_focus')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    # A command makes its own parser, so that this one is quick
    name = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[name].run(argv[1:])
    except FocusError as error:
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        raise SystemExit(INTERRUPTED if isinstance(error, FocusInterruptedError) else BAD_INPUT) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the process's own. Returns the exit status."""
    try:
        _run(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    except Exception:
        traceback.print_exc()
        return UNEXPECTED
    return OK


if __name__ == "__main__":
    sys.exit(main())
