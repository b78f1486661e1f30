"""The benchmark as a command: flags, the run, and what it prints and writes."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from .bench_measure import bounded_memory
from .bench_report import plot_rows, report
from .bench_rows import Row, environment
from .bench_suites import SUITES, Settings, run_suites

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "report.md"
# Everything once, at sizes that take about a minute: whether it works, not how fast it is
QUICK = {
    "lengths": (512,),
    "heads": 2,
    "head_dim": 32,
    "span": 64,
    "iterations": (1, 4),
    "rounds": 3,
    "train_steps": 5,
    "shape": "quick",
}


def parse(argv: Sequence[str] | None, description: str | None = None) -> tuple[Settings, int | None]:
    """The settings that flags ask for, and the number of threads."""
    defaults = Settings(Path("outputs/benchmark"))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"])
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--lengths", type=int, nargs="+", help="tokens; default: each mode's own, 1k to 32k (64k on a GPU)")
    add("--batch", type=int, help="default: 1")
    add("--heads", type=int, help="of the op suite and the decode suite's attention; default: 8")
    add("--head-dim", type=int, help="default: 64")
    add("--span", type=int, help="keys that local attention sees; default: 256")
    add("--iterations", type=int, nargs="+", help="of FocusA; default: 1 2 4 10")
    add("--rounds", type=int, help="timings of each contender, in turns; default: 5")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--backend", help="of focus_attention; default: auto")
    add("--only", nargs="+", metavar="PATTERN", help="contenders, besides those that ratios are to; such as 'focus*'")
    add("--train-steps", type=int, help="of the model whose inputs show how soon queries stop; default: 30")
    add("--no-memory", action="store_true", help="no peak memory, which takes a process for each contender")
    add("--quick", action="store_true", help="tiny sizes, under two minutes; other flags win over it")
    add("--output", type=Path, default=defaults.output, help="folder; rows that its CSV files have are not repeated")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if value is not None and hasattr(defaults, name) and name not in ("device", "dtype")
    }
    settings = replace(
        defaults,
        suites=SUITES if "all" in args.suite else tuple(args.suite),
        device=device,
        dtype=DTYPES[args.dtype or ("float32" if device == "cpu" else "bfloat16")],
        memory=not args.no_memory,
        **{**(QUICK if args.quick else {}), **given},
    )
    return settings, args.threads


def main(argv: Sequence[str] | None = None, description: str | None = None) -> list[Row]:
    """Run the benchmark that the flags ask for; print the report and write it beside the CSV files.

    Returns:
        All rows, those of earlier runs in the same folder included.
    """
    settings, threads = parse(argv, description)
    if threads is not None:
        torch.set_num_threads(threads)
    known = environment(settings.device, settings.dtype)
    # A GPU's driver reserves addresses far beyond the memory there is
    with bounded_memory() if settings.device == "cpu" else nullcontext():
        rows = run_suites(settings, known)
    text = report(rows, known)
    (settings.output / REPORT).write_text(text, encoding="utf-8")
    print(text)
    if find_spec("matplotlib") is None:
        print("No pictures: they need matplotlib (pip install hf_focus[plots])")
    else:
        for suite in settings.suites:
            plot_rows(settings.output / f"{suite}.png", [row for row in rows if row.suite == suite])
    print(settings.output)
    return rows
