"""What goes wrong in long runs, on real processes: nothing is lost, and the run goes on as if nothing had been."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import complete, finish, kill_in_checkpoint, kill_in_step, logged, message, prepare, start, stop_in_step
from safetensors.torch import load_file

from hf_focus.checkpoints import list_checkpoints

INTERRUPTED = 75


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    complete(folder)
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert logged(folder) == logged(whole)
    expected = load_file(whole / "out" / "model.safetensors")
    found = load_file(folder / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in list_checkpoints(folder / "out")]


@pytest.mark.parametrize(
    ("sabotage", "code", "left"),
    [
        pytest.param((kill_in_step, 6), -signal.SIGKILL, [2, 4], marks=pytest.mark.slow),
        ((kill_in_checkpoint, 3), -signal.SIGKILL, [2, 4]),
        ((stop_in_step, 7), INTERRUPTED, [6, 7]),
    ],
    ids=["killed in a step", "killed in a checkpoint", "terminated"],
)
def test_an_ended_run_goes_on_to_the_same_results(
    tmp_path: Path, whole: Path, sabotage: tuple[Callable[..., None], int], code: int, left: list[int]
) -> None:
    prepare(tmp_path)
    assert finish(start(tmp_path, sabotage=sabotage)) == [code]
    assert steps_of(tmp_path) == left
    assert not (tmp_path / "out" / "model.safetensors").exists()
    if code == INTERRUPTED:
        assert "--resume latest" in message(tmp_path)
    complete(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, whole)
    assert not list((tmp_path / "out").glob("partial-*"))


def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        prepare(folder, num_processes=2)
    complete(folders[0], ranks=2)
    kept, lost = start(folders[1], ranks=2, sabotage=(kill_in_step, 6))
    assert finish([lost]) == [-signal.SIGKILL]
    # Within a minute
    assert finish([kept], patience=60) == [INTERRUPTED]
    assert re.search("another process .* --resume latest", message(folders[1]))
    assert steps_of(folders[1]) == [2, 4]
    complete(folders[1], "--resume", "latest", ranks=2)
    assert_same_run(folders[1], folders[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory as `out`, with options."""
    target = tmp_path / "out"

    def mount(options: str) -> Path:
        target.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return target

    yield mount
    subprocess.run(["umount", str(target)], capture_output=True)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, whole: Path, small_disk: Callable[[str], Path]) -> None:
    size = sum(file.stat().st_size for file in (whole / "out" / "checkpoint-12").rglob("*") if file.is_file())
    prepare(tmp_path)
    # Room for two checkpoints and a half: the third is written before the first is removed
    out = small_disk(f"size={size * 5 // 2}")
    assert finish(start(tmp_path)) == [2]
    assert re.search("checkpoint-6 could not be written .* MiB are free", message(tmp_path))
    assert steps_of(tmp_path) == [2, 4]
    assert not list(out.glob("partial-*"))
    subprocess.run(["mount", "-o", f"remount,size={size * 6}", str(out)], check=True)
    complete(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, whole)


def test_a_read_only_folder(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    prepare(tmp_path)
    small_disk("size=1m,ro")
    assert finish(start(tmp_path)) == [2]
    assert "output_dir" in message(tmp_path)
    assert "written" in message(tmp_path)


@pytest.mark.parametrize(
    "where", ["gradient", *(pytest.param(w, marks=pytest.mark.slow) for w in ("output", "weight"))]
)
def test_numbers_that_are_not_finite(tmp_path: Path, whole: Path, where: str) -> None:
    prepare(tmp_path)
    assert finish(start(tmp_path, sabotage=(spoil, where, 6))) == [2]
    last = message(tmp_path)
    named = {
        "output": "the output of model.layers.1.mlp.down_proj",
        "gradient": "the gradient of the output of model.layers.1.mlp.down_proj",
        "weight": "the weight model.layers.1.mlp.down_proj.weight",
    }
    assert f"{named[where]} " in last
    assert "step 6" in last
    assert "checkpoint-4" in last
    assert steps_of(tmp_path) == [2, 4]
    if where == "gradient":
        complete(tmp_path, "--resume", "latest")
        assert_same_run(tmp_path, whole)


def spoil(where: str, step: int) -> None:
    """Make a number of one module infinite or NaN from a step on."""
    from hf_focus import training

    train = training.train

    def spoiled(run: Any) -> Any:
        module = run.model.get_submodule("model.layers.1.mlp.down_proj")

        def harm(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if run.progress.step + 1 < step:
                return None
            if where == "weight":
                module.weight.data[0, 0] = float("inf")
            elif where == "gradient":
                output.register_hook(lambda gradient: gradient * float("nan"))
            else:
                return output * float("inf")
            return None

        module.register_forward_hook(harm)
        return train(run)

    training.train = spoiled
