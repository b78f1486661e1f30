"""The evidence as a command: flags, the run, the report."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from .evidence_groups import GROUPS, QUICK, find_groups, on_dataset
from .evidence_map import write_map
from .evidence_plan import Group, seeds_that_count
from .evidence_plots import plot_group
from .evidence_report import counted, report
from .evidence_run import read_rows, run_rows

REPORT = "REPORT.md"
# Of what is not committed
OUTPUTS = Path("outputs")
QUICK_NOTE = "**Short versions** (`--quick`), of one or two seeds: they show that everything runs, and decide nothing."


def main(argv: Sequence[str] | None = None, description: str | None = None, folder: Path | None = None) -> int:
    """Measure what is missing, then write the report.

    Args:
        folder: of the report, with the raw results in `results/`. `--output` wins over it; what `--quick` or
            `--dataset` measure has a folder of its own.

    Returns:
        Rows that are still to be measured.
    """
    args = _parser(description).parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    groups, output = QUICK if args.quick else GROUPS, folder or OUTPUTS / "evidence"
    if args.quick:
        output = OUTPUTS / "evidence-quick"
    if args.dataset:
        named = re.sub(r"\W+", "-", Path(args.dataset).name)
        output = OUTPUTS / f"evidence-{'quick-' if args.quick else ''}{named}"
        groups = on_dataset(groups, args.dataset, dataset_config=args.dataset_config, text_column=args.text_column)
    output = args.output or output
    if args.map:
        print(write_map(output, device=device, progress=_say))
        return 0
    left = 0
    if not args.report:
        for group in find_groups(args.groups, groups):
            left += run_group(group, output, device, args.variants, args.seeds, args.minutes)
    write_report(output, groups, QUICK_NOTE if args.quick else "")
    print(output / REPORT)
    return left


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("groups", nargs="*", default=["all"], help=f"what to measure: all, {', '.join(GROUPS)}")
    add("--quick", action="store_true", help=f"short versions of {', '.join(QUICK)}: under ten minutes on two cores")
    add("--report", action="store_true", help="only write the report from the results that there are")
    add("--map", action="store_true", help="only train a model on text and draw what FocusA does in it")
    add(
        "--dataset",
        help="other text for the tasks on text: a data set of the Hub, a folder, or a .txt, .jsonl, … file",
    )
    add("--dataset-config", help="configuration of the data set, where it has several")
    add("--text-column", help="column of the text; default: text, or the only column of strings")
    add("--variants", nargs="+", help="only these variants of the groups")
    add("--seeds", type=int, help="seeds of every group; default: the group's own")
    add("--minutes", type=float, help="begin no row after this time; start again to go on")
    add("--device", help="default: cuda if there is one")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--output", type=Path, help="folder of the report and of results/")
    return parser


def run_group(
    group: Group,
    output: Path,
    device: str,
    variants: Sequence[str] | None = None,
    seeds: int | None = None,
    minutes: float | None = None,
) -> int:
    """Measure a group's missing rows: first those that choose learning rates, then those that count.

    Returns:
        Rows that are still to be measured.
    """
    path = output / "results" / group.file
    limit = None if minutes is None else 60 * minutes
    wanted = {"variant": set(variants or group.variants), "seeds": group.seeds if seeds is None else seeds}
    tuning = [row for row in group.tuning_rows() if row.variant in wanted["variant"]]
    left = run_rows(tuning, path, device, _say, limit) if tuning else 0
    if left:
        return left
    rates = group.choose_rates(read_rows(path))
    rows = [group.row(v, seed, rates[v]) for seed in seeds_that_count(wanted["seeds"]) for v in group.variants]
    return run_rows([row for row in rows if row.variant in wanted["variant"]], path, device, _say, limit)


def write_report(output: Path, groups: Mapping[str, Group] = GROUPS, note: str = "") -> None:
    """The page and its pictures, from the files of results; `note` stands before all else on it."""
    output.mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib") is None:
        print("No pictures: they need matplotlib (pip install hf_focus[plots])", file=sys.stderr)
    else:
        for group in groups.values():
            found = counted(group, read_rows(output / "results" / group.file))
            if sum(map(bool, found.values())) > 1:
                plot_group(output / f"{group.name}.png", group, found)
    (output / REPORT).write_text(report(output / "results", groups, note), encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
