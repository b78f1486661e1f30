"""The suites of the benchmark: which contenders at which sizes, measured together and written as rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import bench_models as models
from .bench_cases import Call, Case, make_inputs
from .bench_contenders import SDPA_CAUSAL, Contender
from .bench_focus import ONE_PASS, contenders
from .bench_measure import SHORTEST, Timing, describe, measure_interleaved, peak_memory, release
from .bench_rows import Row, RowFile
from .bench_trained import trained_inputs

MATMUL = "matmul"
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
SDPA_FULL = "SDPA full"


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see the flags of the command."""

    output: Path
    suites: tuple[str, ...] = ("op", "decode", "models")
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    span: int = 256
    iterations: tuple[int, ...] = (1, 2, 4, 10)
    rounds: int = 5
    backend: str = "auto"
    only: tuple[str, ...] = ("*",)
    train_steps: int = 30
    memory: bool = True
    shape: str | None = None
    shortest: float = SHORTEST

    @property
    def model_shape(self) -> models.ModelShape:
        return models.SHAPES[self.shape or self.device]


@dataclass(frozen=True)
class Mode:
    """Contenders of one kind that are measured together, length by length.

    Args:
        suite, name: where its rows go.
        baseline: contender that ratios are to.
        list_names: contenders, whether they can run or not.
        prepare: settings, length and names -> calls by name, or why there is none.
        lengths: by device.
        longest: by device; more is not tried.
        memory: whether peak memory is measured.
        whole_model: whether its shape is the model's.
    """

    suite: str
    name: str
    baseline: str
    list_names: Callable[[Settings], list[str]]
    prepare: Callable[[Settings, int, Sequence[str]], dict[str, Call | str]]
    lengths: Mapping[str, tuple[int, ...]]
    longest: Mapping[str, int] = field(default_factory=dict)
    memory: bool = False
    whole_model: bool = False


def _attend(training: bool, queries: int | None = None) -> Callable[..., dict[str, Call | str]]:
    def prepare(settings: Settings, length: int, names: Sequence[str]) -> dict[str, Call | str]:
        case = _case(settings, length, training, queries, names)
        known = {contender.name: contender for contender in contenders(settings.iterations)}
        return {name: _matmul(settings) if name == MATMUL else _build(known[name], case) for name in names}

    return prepare


def _case(settings: Settings, length: int, training: bool, queries: int | None, names: Sequence[str]) -> Case:
    s = settings
    trained = {}
    for count in s.iterations:
        # Trained only if somebody needs it
        if any(name.startswith(f"focus {count}, trained") for name in names):
            longest = max(s.lengths or OP_LENGTHS[s.device])
            sizes = (s.heads, s.head_dim, s.span, count, longest, s.train_steps)
            trained[count] = str(trained_inputs(s.output / "inputs", *sizes, s.device))
    sizes = (length, s.batch, s.heads, s.head_dim, s.span)
    return Case(*sizes, s.device, s.dtype, training, queries, s.backend, tuple(trained.items()))


def _build(contender: Contender, case: Case) -> Call | str:
    if reason := contender.why_not(case):
        return reason
    try:
        return contender.build(case)
    except Exception as error:
        return describe(error)


def _matmul(settings: Settings) -> Call:
    """The machine's own speed, in the same rounds: what the others' flops are held against."""
    size = MATMUL_SIZE[settings.device]
    a, b = (torch.randn(size, size, device=settings.device).to(settings.dtype) for _ in range(2))
    return Call(lambda: a @ b, facts=lambda: {"flops": 2.0 * size**3})


def _model_calls(build: Callable[[str, models.ModelCase], Call]) -> Callable[..., dict[str, Call | str]]:
    def prepare(settings: Settings, length: int, names: Sequence[str]) -> dict[str, Call | str]:
        s = settings
        case = models.ModelCase(s.model_shape, length, s.span, s.batch, s.device, s.dtype)
        calls: dict[str, Call | str] = {}
        for name in names:
            try:
                calls[name] = build(name, case)
            except Exception as error:
                calls[name] = describe(error)
                release()
        return calls

    return prepare


def _op_names(settings: Settings) -> list[str]:
    return [MATMUL, *(contender.name for contender in contenders(settings.iterations))]


def _decode_names(settings: Settings) -> list[str]:
    return [contender.name for contender in contenders(settings.iterations) if contender.decodes]


def _model_names(settings: Settings) -> list[str]:
    return list(models.MODELS)


OP_LENGTHS = {"cpu": (1024, 4096, 16384), "cuda": (4096, 16384, 65536)}
LONG = {"cpu": (1024, 4096, 16384, 32768), "cuda": (1024, 4096, 16384, 32768, 65536)}
MODES = (
    Mode("op", "forward", SDPA_CAUSAL, _op_names, _attend(False), OP_LENGTHS),
    Mode("op", "forward+backward", SDPA_CAUSAL, _op_names, _attend(True), OP_LENGTHS, memory=True),
    Mode("decode", "attention", SDPA_FULL, _decode_names, _attend(False, queries=1), LONG),
    Mode("decode", "model", models.ORIGINAL, _model_names, _model_calls(models.decode), LONG, whole_model=True),
    Mode("models", "prefill", models.ORIGINAL, _model_names, _model_calls(models.prefill), LONG, whole_model=True),
    Mode(
        "models",
        "train step",
        models.ORIGINAL,
        _model_names,
        _model_calls(models.TrainStep),
        LONG,
        # Logits of the whole input, several times, in float32
        longest={"cpu": 8192, "cuda": 32768},
        whole_model=True,
    ),
)
SUITES = tuple(dict.fromkeys(mode.suite for mode in MODES))


def run_suites(settings: Settings, environment: dict[str, str], show_progress: bool = True) -> list[Row]:
    """Measure what is not in the files yet.

    Returns:
        All rows of the suites' files with these settings, whatever their length, those of earlier runs included.
    """
    files = {suite: RowFile(settings.output / f"{suite}.csv", environment) for suite in settings.suites}
    groups = list(_groups(settings))
    with tqdm(total=len(groups) * settings.rounds, desc="Benchmark", disable=not show_progress) as bar:
        for mode, length in groups:
            bar.set_postfix_str(f"{mode.suite}, {mode.name}, {length}")
            before = bar.n
            run_group(settings, mode, length, files[mode.suite], lambda: bar.update())
            bar.update(before + settings.rounds - bar.n)
    models.forget_models()
    blanks = {(mode.suite, mode.name): _blank(settings, mode, 0) for mode in MODES}

    def belongs(row: Row) -> bool:
        return (
            replace(blanks[row.suite, row.mode], contender=row.contender, length=row.length).settings == row.settings
        )

    return [row for file in files.values() for row in file.rows if belongs(row)]


def _groups(settings: Settings) -> Iterator[tuple[Mode, int]]:
    for mode in MODES:
        if mode.suite in settings.suites:
            for length in settings.lengths or mode.lengths[settings.device]:
                if length <= mode.longest.get(settings.device, length):
                    yield mode, length


def run_group(
    settings: Settings, mode: Mode, length: int, file: RowFile, on_round: Callable[[], object] = lambda: None
) -> None:
    """Measure the contenders of a mode at a length that `file` does not have, together with those that ratios are to,
    and append their rows."""
    names = mode.list_names(settings)
    references = {mode.baseline, ONE_PASS, MATMUL} & set(names)
    chosen = [n for n in names if n in references or any(fnmatch(n, pattern) for pattern in settings.only)]
    blank = _blank(settings, mode, length)
    missing = {name for name in chosen if not file.has(replace(blank, contender=name))}
    if not missing:
        return
    prepared = mode.prepare(settings, length, [n for n in chosen if n in missing or n in references])
    calls = {name: call for name, call in prepared.items() if isinstance(call, Call)}
    runs = {name: call.run for name, call in calls.items()}
    timings, failed = measure_interleaved(runs, settings.device, settings.rounds, settings.shortest, on_round)
    facts = {name: calls[name].facts() for name in timings if name in missing}
    notes = {name: reason for name, reason in prepared.items() if isinstance(reason, str)} | failed
    # Memory is measured with nothing else in it
    del prepared, calls, runs
    make_inputs.cache_clear()
    release()
    rows = [replace(blank, contender=name, note=notes.get(name)) for name in chosen if name in missing]
    for row in rows:
        if row.contender in timings:
            _add_times(row, mode, timings, facts[row.contender])
    if mode.memory and settings.memory:
        _add_memory(rows, mode, settings, length)
    file.append(rows)


def _add_times(row: Row, mode: Mode, timings: Mapping[str, Timing], facts: Mapping[str, float]) -> None:
    timing, base, one = timings[row.contender], timings.get(mode.baseline), timings.get(ONE_PASS)
    row.median_s, row.min_s, row.baseline = timing.median, timing.min, mode.baseline
    row.ratio = timing.ratio(base) if base else None
    row.ratio_to_one_pass = timing.ratio(one) if one else None
    for fact, value in facts.items():
        setattr(row, fact, value)


def _add_memory(rows: Sequence[Row], mode: Mode, settings: Settings, length: int) -> None:
    timed = [row for row in rows if row.median_s is not None and row.contender != MATMUL]
    names = list(dict.fromkeys([mode.baseline, *(row.contender for row in timed)]))
    peaks = peak_memory(_case(settings, length, True, None, names), names, settings.iterations)
    base = peaks[mode.baseline]
    for row in timed:
        peak = peaks[row.contender]
        if isinstance(peak, str):
            row.note = f"memory {peak}"
        else:
            row.peak_bytes = peak
            row.peak_ratio = peak / base if isinstance(base, int) and base else None


def _blank(settings: Settings, mode: Mode, length: int) -> Row:
    s = settings
    shape = str(s.model_shape) if mode.whole_model else f"{s.heads} heads × {s.head_dim}"
    return Row(mode.suite, mode.name, "", length, s.batch, shape, s.span, s.backend, s.rounds)
