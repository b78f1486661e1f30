"""The same results however many processes share the work, each a real one (gloo)."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launch import complete, finish, logged, message, prepare, start
from safetensors.torch import load_file

STEPS = 20
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    "streaming",
    [pytest.param(False, id="a data set"), pytest.param(True, id="a stream", marks=pytest.mark.slow)],
)
def test_two_processes_equal_one_that_accumulates(tmp_path: Path, streaming: bool) -> None:
    """Dropout, the refiner's exploration, and passes that end in the middle of a step included."""
    weights, losses = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        settings = {"streaming": streaming, "shuffle_buffer": 4, "gradient_accumulation_steps": 2 // ranks}
        prepare(folder, max_steps=STEPS, save_steps=None, epsilon=0.3, **settings)
        complete(folder, "--num-processes", str(ranks), ranks=ranks)
        weights.append(load_file(folder / "out" / "model.safetensors"))
        losses.append(logged(folder))
    one, two = losses
    assert two == pytest.approx(one, abs=1e-5)
    assert len(set(one.values())) == STEPS
    assert any(name.endswith("refiner.table") for name in weights[0])
    start_weights = load_file(tmp_path / "1" / "start" / "model.safetensors")
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() <= 1e-5, name
        if name.endswith("num_updates"):
            assert value.item() == STEPS
        if name.endswith("refiner.table"):
            assert value.any()
        if name in start_weights:
            assert (value - start_weights[name]).abs().max() > 1e-3, name


def test_another_number_of_processes_than_asked_for_is_an_error(tmp_path: Path) -> None:
    prepare(tmp_path)
    for asked, ranks in (("2", 1), ("1", 2)):
        codes = finish(start(tmp_path, "--num-processes", asked, ranks=ranks))
        assert codes == [2] * ranks
        assert all("num_processes" in message(tmp_path, rank) for rank in range(ranks))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_launch_starts_what_the_configuration_says(tmp_path: Path) -> None:
    prepare(tmp_path, max_steps=2, save_steps=None)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(SCRIPTS / "configs" / "ddp.yaml"),
    ]
    command = [*launch, str(SCRIPTS / "finetune.py"), "run.json", "--num-processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert len(logged(tmp_path)) == 2


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_configurations_are_what_accelerate_reads(name: str) -> None:
    config = load_config_from_file(str(SCRIPTS / "configs" / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.mixed_precision == "no"
