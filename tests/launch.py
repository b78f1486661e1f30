"""Fine-tuning in real processes, which can be killed. They are forked from one that has imported everything."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from small_runs import byte_tokenizer, texts, tiny_llama

import hf_focus.training  # noqa: F401 - imported once, for all
from hf_focus.cli import main

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["launch"])
# Seconds until a run that should have ended is a failure
PATIENCE = 240


def serve() -> None:
    """Start the server, unless it runs. There is one a process: who first starts it says what it imports."""
    # It is not told of this folder before it imports, and is silent about imports that fail
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that has imported everything, started."""
    serve()
    process = FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def prepare(folder: Path, **settings: Any) -> None:
    """A tiny model with dropout, documents and `run.json` of twelve steps, a checkpoint after each second one."""
    tiny_llama(attention_dropout=0.1).save_pretrained(folder / "start")
    byte_tokenizer().save_pretrained(folder / "start")
    rows = [json.dumps({"text": text}) + "\n" for text in texts(9)]
    (folder / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    values = {
        "model_name_or_path": "start",
        "train_files": ["data.jsonl"],
        "eval_share": 0.0,
        "output_dir": "out",
        "max_steps": 12,
        "save_steps": 2,
        "block_size": 16,
        "batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_span": 8,
        "ramp": 3,
        "max_iterations": 2,
        # It draws random numbers, which have to be the same again
        "refiner": True,
        "reward": "seed",
        "cpu": True,
        "progress_bar": False,
        "cache_dir": "cache",
    }
    (folder / "run.json").write_text(json.dumps({**values, **settings}), encoding="utf-8")


def start(
    folder: Path, *flags: str, ranks: int = 1, sabotage: tuple[Callable[..., None], ...] | None = None
) -> list[BaseProcess]:
    """`hf-focus finetune run.json` in `folder`, on `ranks` processes that find each other as under torchrun.

    Args:
        sabotage: a function and its arguments, called in the last rank before the run.
    """
    # Where they find each other outlives each of them, as torchrun's does
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(ranks):
        harm = sabotage if rank == ranks - 1 else None
        processes.append(fork(_run, str(folder), flags, rank, ranks, store.port, harm))
        processes[rank].store = store
    return processes


def _enter(folder: str, rank: int = 0) -> None:
    """Work in a folder, whose files `stdout0`, `stderr0` and so on take what is printed."""
    os.chdir(folder)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)


def run_script(script: Path, folder: str, *arguments: str) -> None:
    """As `python script` does in a folder; for `fork`."""
    _enter(folder)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _run(folder: str, flags: tuple[str, ...], rank: int, ranks: int, port: int, sabotage: Any) -> None:
    _enter(folder, rank)
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    if sabotage is not None:
        function, *arguments = sabotage
        function(*arguments)
    code = main(["finetune", "run.json", *flags])
    sys.stdout.flush()
    sys.stderr.flush()
    # As a killed peer leaves it, the process group has nobody to say goodbye to
    os._exit(code)


def finish(processes: list[BaseProcess], patience: float = PATIENCE) -> list[int]:
    """Wait for the processes' exit codes; minus a signal's number where one ended it."""
    for process in processes:
        process.join(patience)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "did not end in time"
    return [process.exitcode for process in processes]


def complete(folder: Path, *flags: str, ranks: int = 1) -> None:
    """A run that must end well."""
    codes = finish(start(folder, *flags, ranks=ranks))
    assert codes == [0] * ranks, (folder / "stderr0").read_text()


def message(folder: Path, rank: int = 0) -> str:
    """The last line of a process's stderr."""
    return (folder / f"stderr{rank}").read_text().strip().rpartition("\n")[2]


def logged(folder: Path) -> dict[int, float]:
    """Losses by step, from the log."""
    lines = map(json.loads, (folder / "out" / "train_log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def kill_in_step(number: int) -> None:
    """Kill this process in the backward pass of a step, counted from 1."""
    backward, calls = Accelerator.backward, []

    def kill(self: Accelerator, loss: torch.Tensor, **options: Any) -> None:
        calls.append(loss)
        if len(calls) == number:
            loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        backward(self, loss, **options)

    Accelerator.backward = kill


def kill_in_checkpoint(number: int) -> None:
    """Kill this process while a checkpoint is written, counted from 1, with half of the weights on the disk."""
    save, calls = Accelerator.save_state, []

    def kill(self: Accelerator, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        calls.append(folder)
        if len(calls) == number:
            weights = Path(folder) / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    Accelerator.save_state = kill


def stop_in_step(number: int) -> None:
    """Send SIGTERM to this process in the backward pass of a step, counted from 1."""
    backward, calls = Accelerator.backward, []

    def stop(self: Accelerator, loss: torch.Tensor, **options: Any) -> None:
        backward(self, loss, **options)
        calls.append(loss)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    Accelerator.backward = stop
