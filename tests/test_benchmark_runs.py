"""The benchmark measures, its files resume, its targets are judged right. No time is asserted."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launch import serve

from hf_focus import FocusError
from hf_focus.bench_cases import Call, Case
from hf_focus.bench_contenders import FLEX, SDPA_CAUSAL, SEED_LOOP
from hf_focus.bench_focus import ONE_PASS, contenders
from hf_focus.bench_measure import Timing, bounded_memory, measure_interleaved, peak_memory
from hf_focus.bench_models import LIMITED, ORIGINAL, PATCHED, SHAPES, ModelShape
from hf_focus.bench_report import plot_rows, report
from hf_focus.bench_rows import HEADER, Row, RowFile, environment
from hf_focus.bench_run import main, parse
from hf_focus.bench_suites import MATMUL, MATMUL_SIZE, MODES, Settings, run_group, run_suites
from hf_focus.bench_targets import MET, MISSED, NOT_MEASURED, TARGETS, Target, judge

ENVIRONMENT = {"torch": "0", "kind": "cpu"}
BLANK = Row("op", "forward", "", 64, 1, "2 heads × 8", 16, "auto", 2)
TINY = Settings(
    Path("unset"),
    suites=("op",),
    lengths=(64,),
    heads=2,
    head_dim=8,
    span=16,
    iterations=(1, 4),
    rounds=2,
    train_steps=1,
    shape="tiny",
    memory=False,
    shortest=0.0,
)


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", ModelShape(16, 2, 2, 1, 24, 50))
    monkeypatch.setitem(MATMUL_SIZE, "cpu", 32)


# Measuring


def test_contenders_take_turns_and_failures_are_left_out() -> None:
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("no memory\nat all")

    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}
    timings, failed = measure_interleaved(calls, "cpu", rounds=3, shortest=0.0)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert set(timings) == {"a", "b"}
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    assert failed == {"c": "failed: RuntimeError: no memory"}


def test_a_failure_in_a_round_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))

    def third_time() -> None:
        if next(times) >= 2:
            raise RuntimeError("late")

    timings, failed = measure_interleaved({"a": lambda: None, "b": third_time}, "cpu", rounds=2, shortest=0.0)
    assert set(timings) == {"a"}
    assert failed == {"b": "failed: RuntimeError: late"}


def test_ratio_is_of_the_same_round() -> None:
    # A machine that gets ten times slower after the first round
    ours, theirs = Timing([1.0, 10.0, 10.0]), Timing([2.0, 20.0, 20.0])
    assert ours.ratio(theirs) == 0.5
    assert (ours.median, ours.min) == (10.0, 1.0)


def test_peak_memory_counts_what_a_call_makes() -> None:
    case = Case(1024, heads=4, head_dim=32, span=64, training=True)
    names = [SDPA_CAUSAL, "SDPA band mask", "flash-attn window"]
    # The server that other tests fork from too
    serve()
    peaks = peak_memory(case, names, [1])
    # The output and three gradients of half a MiB; the mask is turned into 4 MiB of numbers
    assert 2 * 2**20 <= peaks[SDPA_CAUSAL] < peaks["SDPA band mask"] - 3 * 2**20
    assert peaks["flash-attn window"].startswith("failed")


def test_too_much_memory_fails_instead_of_ending_the_process() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("Linux only")
    with bounded_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**46, dtype=torch.uint8)


# Files


def test_rows_survive_the_file(tmp_path: Path) -> None:
    row = replace(BLANK, contender='a, "b"', median_s=0.1234567890123, peak_bytes=12, note=None)
    file = RowFile(tmp_path / "op.csv", ENVIRONMENT)
    file.append([row, replace(BLANK, contender="none", note="not here")])
    again = RowFile(tmp_path / "op.csv", ENVIRONMENT)
    assert again.rows == file.rows
    assert again.rows[0] == row
    assert (tmp_path / "op.csv").read_text().startswith(HEADER + '{"torch"')


def test_half_a_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "op.csv"
    RowFile(path, ENVIRONMENT).append([replace(BLANK, contender=name, median_s=1.0) for name in "ab"])
    path.write_text(path.read_text()[:-30])
    file = RowFile(path, ENVIRONMENT)
    assert [row.contender for row in file.rows] == ["a"]
    file.append([replace(BLANK, contender="b", median_s=2.0)])
    assert [row.median_s for row in RowFile(path, ENVIRONMENT).rows] == [1.0, 2.0]


def test_failures_are_tried_again_and_stand_once(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "op.csv", ENVIRONMENT)
    failure = replace(BLANK, contender="a", note="failed")
    file.append([failure])
    assert not file.has(failure)
    file.append([replace(failure, note=None, median_s=1.0)])
    assert file.has(failure)
    assert not file.has(replace(failure, rounds=3))
    assert [row.median_s for row in RowFile(tmp_path / "op.csv", ENVIRONMENT).rows] == [1.0]


def test_another_environment_is_refused(tmp_path: Path) -> None:
    RowFile(tmp_path / "op.csv", ENVIRONMENT)
    with pytest.raises(FocusError, match="measured elsewhere"):
        RowFile(tmp_path / "op.csv", {**ENVIRONMENT, "torch": "1"})


def test_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, output=tmp_path, only=("SDPA full",))
    rows = run_suites(settings, ENVIRONMENT, show_progress=False)
    names = [MATMUL, "SDPA full", SDPA_CAUSAL, ONE_PASS]
    assert [(row.mode, row.contender) for row in rows] == [
        (mode, name) for mode in ("forward", "forward+backward") for name in names
    ]
    for row in rows:
        assert row.median_s > 0
        assert row.baseline == SDPA_CAUSAL
    text = (tmp_path / "op.csv").read_text()

    # Nothing left to do
    with monkeypatch.context() as patch:
        patch.setattr("hf_focus.bench_suites.measure_interleaved", lambda *_, **__: pytest.fail("measured again"))
        assert run_suites(settings, ENVIRONMENT, show_progress=False) == rows

    # One contender more: its rivals are timed with it again, and keep their rows
    more = run_suites(replace(settings, only=("SDPA full", "SDPA band mask")), ENVIRONMENT, show_progress=False)
    assert {row.contender for row in more} == {*names, "SDPA band mask"}
    assert (tmp_path / "op.csv").read_text().startswith(text)
    # Rows with other settings stay in the file, and out of the result
    assert {row.span for row in run_suites(replace(settings, span=8), ENVIRONMENT, show_progress=False)} == {8}


def test_a_contender_that_cannot_be_built_gets_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: Case) -> Call:
        raise ValueError("odd")

    broken = [replace(c, build=build) if c.name == SEED_LOOP else c for c in contenders([1])]
    monkeypatch.setattr("hf_focus.bench_suites.contenders", lambda iterations: broken)
    file = RowFile(tmp_path / "op.csv", ENVIRONMENT)
    run_group(replace(TINY, only=(SEED_LOOP, "flash*")), MODES[0], 64, file)
    notes = {row.contender: row.note for row in file.rows}
    assert notes[SEED_LOOP] == "failed: ValueError: odd"
    assert notes["flash-attn window"] == "not on cpu"
    assert notes[ONE_PASS] is None


# Targets and the report


def rows_of(mode: str, ratios: dict[str, float], length: int = 4096, suite: str = "op") -> list[Row]:
    row = replace(BLANK, suite=suite, mode=mode, length=length)
    return [replace(row, contender=name, ratio=ratio, median_s=9.0) for name, ratio in ratios.items()]


def test_targets_are_ratios_of_rows() -> None:
    measured = {
        "local-attention, span/1 × 1": 0.6,
        "local-attention, span/2 × 2": 0.5,
        FLEX: 0.3,
        SEED_LOOP: 4.0,
        ONE_PASS: 0.25,
        "focus 4": 1.1,
        "focus 4, trained": 0.1,
        "focus 10": 1.0,
    }
    rows = [
        *rows_of("forward", measured),
        *rows_of("forward", {ONE_PASS: 1.0, FLEX: 0.5}, length=1024),
        *rows_of("train step", {ORIGINAL: 1.0, PATCHED: 1.3}, suite="models"),
        *rows_of("prefill", {ORIGINAL: 1.0, LIMITED: 0.5}, suite="models", length=16384),
        *rows_of("model", {ORIGINAL: 1.0, PATCHED: 1.2}, suite="decode", length=16384),
    ]
    found = {(v.name, v.length): (v.measured, v.verdict) for v in judge(rows, "cpu")}
    assert found["one pass is faster than local-attention (forward)", 4096] == (2.0, MISSED)
    assert found["one pass is faster than local-attention (forward)", 1024] == (None, NOT_MEASURED)
    assert found["one pass is faster than local-attention (forward+backward)", None] == (None, NOT_MEASURED)
    assert found["one pass is as fast as FlexAttention (forward)", 4096] == (pytest.approx(1.2), MET)
    assert found["one pass is as fast as FlexAttention (forward)", 1024] == (0.5, MISSED)
    assert found["4 iterations cost at most 4 passes (forward)", 4096] == (pytest.approx(4.4), MISSED)
    assert found["10 iterations are faster than the seed's loop (forward)", 4096] == (4.0, MET)
    assert found["a train step costs little more (train step)", 4096] == (1.3, MET)
    assert found["a limited global branch makes prefill faster (prefill)", 16384] == (2.0, MET)
    assert found["a decode step costs little more (model)", 16384] == (1.2, MISSED)
    assert not any("FlexAttentions" in name for name, _ in found)

    on_gpu = {(v.name, v.length): (v.measured, v.verdict) for v in judge(rows, "cuda")}
    assert on_gpu["10 iterations beat 10 FlexAttentions (forward)", 4096] == (pytest.approx(3.0), MET)
    assert on_gpu["a train step costs little more (train step)", 4096] == (1.3, MISSED)
    assert on_gpu["a limited global branch makes prefill faster (prefill)", 65536] == (None, NOT_MEASURED)


def test_memory_targets_compare_bytes() -> None:
    row = replace(BLANK, mode="forward+backward")
    bytes_of = {SDPA_CAUSAL: 100, "focus 4": 110, "focus 10": 130}
    rows = [replace(row, contender=name, peak_bytes=number) for name, number in bytes_of.items()]
    found = {v.name: v.verdict for v in judge(rows, "cpu") if v.measured is not None}
    assert found == {
        "training memory is that of one causal SDPA (forward+backward)": MET,
        "training memory does not grow with the iterations (forward+backward)": MISSED,
    }


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_targets_name_rows_that_exist(target: Target) -> None:
    from fnmatch import fnmatch

    (mode,) = (mode for mode in MODES if (mode.suite, mode.name) == (target.suite, target.mode))
    names = mode.list_names(Settings(Path()))
    assert any(fnmatch(name, target.over) for name in names)
    assert any(fnmatch(name, target.under) for name in names)


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--heads 2 --head-dim 8 --span 16 --iterations 4 --rounds 1 --lengths 64 --train-steps 1 --no-memory"
    chosen = ["--only", "focus*", "local*", "patched", "--device", "cpu", "--output", str(tmp_path)]
    rows = main(["--quick", *flags.split(), *chosen])
    assert {(row.suite, row.mode) for row in rows} == {(mode.suite, mode.name) for mode in MODES}
    assert {row.contender for row in rows if row.suite == "models"} == {ORIGINAL, PATCHED}
    failures = {row.contender: row.note for row in rows if row.median_s is None}
    assert set(failures.values()) <= {"local_attention is not installed"}
    printed = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert text in printed
    for part in ("## op: forward", "Roofline at 64 tokens", "## Targets", "Tokens per second", torch.__version__):
        assert part in text
    if find_spec("matplotlib"):
        assert {file.name for file in tmp_path.glob("*.png")} == {"op.png", "decode.png", "models.png"}


def test_report_of_few_rows(tmp_path: Path) -> None:
    row = replace(BLANK, contender=ONE_PASS, median_s=0.0012, ratio=0.5, baseline=SDPA_CAUSAL, peak_bytes=2**20)
    rows = [row, replace(BLANK, contender=FLEX, note="no backward on cpu"), replace(row, length=2048)]
    text = report(rows, environment("cpu", torch.float32))
    assert "| focus 1 | 1.20 (0.50) | 1.20 (0.50) |" in text
    assert "| FlexAttention | no backward on cpu |  |" in text
    assert "|  | 64 | 2k |" in text
    pytest.importorskip("matplotlib")
    plot_rows(tmp_path / "x.png", rows)


def test_flags_win_over_quick() -> None:
    settings, threads = parse(["--quick", "--heads", "3", "--suite", "op", "--threads", "2", "--device", "cpu"])
    assert (settings.heads, settings.shape, settings.suites, threads) == (3, "quick", ("op",), 2)
    plain, _ = parse(["--device", "cpu"])
    assert plain == Settings(Path("outputs/benchmark"))
