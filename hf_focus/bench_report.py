"""Tables and pictures of the benchmark's rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from .bench_contenders import OTHERS
from .bench_rows import Row
from .bench_suites import MATMUL, MODES
from .bench_targets import LOCAL, TARGETS, Verdict, judge

_METHODS = {
    "cpu": "largest resident set, each in a process of its own",
    "cuda": "`torch.cuda.max_memory_allocated`",
}


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
    """Everything that a run measured, in markdown: a table for each mode, then memory, rooflines and targets."""
    parts = ["# Benchmark", ", ".join(f"{name} {value}" for name, value in environment.items())]
    for mode in MODES:
        here = [row for row in rows if (row.suite, row.mode) == (mode.suite, mode.name)]
        if not here:
            continue
        measure = f"{here[0].shape}, span {here[0].span}, batch {here[0].batch}, backend {here[0].backend}"
        note = f"milliseconds, median of {here[0].rounds} rounds (ratio to `{mode.baseline}` in the same rounds)"
        parts += [f"## {mode.suite}: {mode.name}", f"{measure}; {note}", _by_length(here, _time)]
        if best := _best_local_attention(here):
            parts.append(f"Best setting of local-attention, which the targets use: {best}")
        if any(row.mean_iterations for row in here):
            parts.append(f"Attentions that a query made: {_iterations(here)}")
        if mode.name in ("model", "attention"):
            parts += ["Tokens per second:", _by_length(here, _tokens)]
        if any(row.peak_bytes is not None for row in here):
            method = _METHODS[environment["kind"]]
            title = (
                f"Peak memory of one call above what was there before it, MiB (ratio to `{mode.baseline}`); {method}:"
            )
            parts += [title, _by_length([row for row in here if row.peak_bytes is not None], _memory)]
        parts += _rooflines(here)
    if any(row.suite == "op" for row in rows):
        computes = [f"- {c.name}: {c.computes}" for c in OTHERS]
        parts += ["What the contenders compute:", "\n".join(computes)]
    parts += ["## Targets", targets_table(judge(rows, environment["kind"], TARGETS))]
    return "\n\n".join(parts) + "\n"


def targets_table(verdicts: Iterable[Verdict]) -> str:
    """The targets, and what became of them."""
    lines = [
        (
            verdict.name,
            f"{verdict.over} / {verdict.under}",
            "" if verdict.length is None else _tokens_in_words(verdict.length),
            verdict.wanted,
            "" if verdict.measured is None else f"{verdict.measured:.2f}",
            verdict.verdict,
        )
        for verdict in verdicts
    ]
    return markdown_table(("target", "ratio of", "tokens", "wanted", "measured", ""), lines)


def _by_length(rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    lengths = sorted({row.length for row in rows})
    cells = {(row.contender, row.length): show(row) for row in rows}
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = [(name, *(cells.get((name, length), "") for length in lengths)) for name in names]
    return markdown_table(("", *map(_tokens_in_words, lengths)), lines)


def _time(row: Row) -> str:
    if row.median_s is None:
        return row.note or ""
    ratio = "" if row.ratio is None or row.contender in (row.baseline, MATMUL) else f" ({row.ratio:.2f})"
    return f"{row.median_s * 1e3:,.2f}{ratio}"


def _memory(row: Row) -> str:
    ratio = "" if row.peak_ratio is None else f" ({row.peak_ratio:.2f})"
    return f"{row.peak_bytes / 2**20:,.1f}{ratio}"


def _tokens(row: Row) -> str:
    return "" if row.median_s is None else f"{row.batch / row.median_s:,.1f}"


def _iterations(rows: Sequence[Row]) -> str:
    longest = max(row.length for row in rows)
    shown = [row for row in rows if row.length == longest and row.mean_iterations]
    return "; ".join(f"{row.contender} {row.mean_iterations:.2f}" for row in shown)


def _best_local_attention(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if fnmatch(row.contender, LOCAL) and row.ratio is not None]
    # Later entries win, so that the quickest stays
    best = {row.length: row for row in sorted(timed, key=lambda row: row.ratio, reverse=True)}
    found = ((_tokens_in_words(length), best[length]) for length in sorted(best))
    return "; ".join(f"{words} {row.contender.partition(', ')[2]} ({row.ratio:.2f})" for words, row in found)


def _rooflines(rows: Sequence[Row]) -> list[str]:
    """A line for each of ours at the longest length: what it reached, and what the machine's own product reached."""
    longest = max(row.length for row in rows)
    here = [row for row in rows if row.length == longest and row.median_s is not None and row.flops]
    own = {row.contender: row for row in here}
    if MATMUL not in own:
        return []
    peak = own[MATMUL].flops / own[MATMUL].median_s
    lines = []
    for row in here:
        if row.contender == MATMUL:
            continue
        rate = row.flops / row.median_s
        lines.append(
            (
                row.contender,
                f"{row.flops / 1e9:.2f}",
                f"{row.bytes / 2**20:.1f}",
                f"{rate / 1e9:.1f}",
                f"{rate / peak:.0%}",
                f"{row.block_flops / row.median_s / peak:.0%}",
                f"{row.exponentials / row.median_s / 1e9:.2f}",
                f"{row.bytes / row.median_s / 1e9:.2f}",
            )
        )
    header = ("", "GFLOP", "MiB", "GFLOP/s", "of matmul", "with slab edges", "Gexp/s", "GB/s")
    measured = f"matmul reached {peak / 1e9:,.0f} GFLOP/s in the same rounds"
    return [f"Roofline at {_tokens_in_words(longest)} tokens; {measured}", markdown_table(header, lines)]


def _tokens_in_words(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def plot_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw time against length, a panel for each mode.

    Args:
        path: of the picture; its suffix gives the format.
        rows: of one suite.
    """
    # The figure without pyplot: nothing global is touched, and no display is needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row.mode for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows if row.contender != MATMUL))
    figure = Figure(figsize=(9 * len(modes), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        timed = [row for row in rows if row.mode == mode and row.median_s is not None]
        # Numbered over all modes: a contender looks the same in every panel
        for number, name in enumerate(names):
            points = sorted((row.length, row.median_s * 1e3) for row in timed if row.contender == name)
            ours = name.startswith(("focus", "patched"))
            style = {"linewidth": 2 if ours else 1, "linestyle": "-" if ours else "--", "color": f"C{number % 10}"}
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="osv^D"[number // 10 % 5], markersize=4, label=name, **style
                )
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=mode)
        lengths = sorted({row.length for row in timed})
        axes.set_xticks(lengths, [_tokens_in_words(length) for length in lengths], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
