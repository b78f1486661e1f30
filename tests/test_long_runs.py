"""What long runs need: early stopping, the best checkpoint, compiled steps, evaluation that disturbs nothing, logs."""

from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import folder, losses, run, tiny_llama
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import hf_focus.training_loop
from hf_focus import FocusConfig
from hf_focus.checkpoints import list_checkpoints
from hf_focus.errors import FocusConfigError, FocusResumeError

EVALUATED = [3.0, 2.0, 2.5, 1.99, 2.4, 2.3]
BEST = {"max_steps": 6, "eval_steps": 1, "load_best_model_at_end": True, "save_limit": 1}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets evaluations return EVALUATED, without the first `done`."""

    def begin(done: int = 0) -> None:
        values = chain(EVALUATED[done:], repeat(0.0))
        monkeypatch.setattr(hf_focus.training_loop, "evaluate_model", lambda *_: {"loss": next(values)})

    return begin


@pytest.mark.parametrize(
    ("settings", "stopped", "best"),
    [
        ({"early_stopping_patience": 1}, 3, 2),
        ({"early_stopping_patience": 3, "early_stopping_threshold": 0.1}, 5, 2),
        ({"early_stopping_patience": 2, "greater_is_better": True, "metric_for_best_model": "eval_loss"}, 3, 1),
        ({}, 6, 4),
    ],
)
def test_it_stops_when_nothing_gets_better_and_ends_with_the_best(
    tmp_path: Path,
    data: dict[str, Any],
    scripted: Callable[..., None],
    settings: dict[str, Any],
    stopped: int,
    best: int,
) -> None:
    scripted()
    result = run(tmp_path, data, tiny_llama(), **BEST, **settings)
    assert result.steps == stopped
    # One that was not the best is not saved unless asked for, and the limit never takes the best
    checkpoint = tmp_path / "out" / f"checkpoint-{best}"
    assert checkpoint in list_checkpoints(tmp_path / "out")
    for saved in (load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")):
        state = result.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in saved.items())


def test_patience_and_the_best_survive_a_resume(
    tmp_path: Path, data: dict[str, Any], scripted: Callable[..., None]
) -> None:
    settings = {**BEST, "max_steps": 6, "save_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 0.1}
    scripted()
    assert run(tmp_path, data, tiny_llama(), **settings).steps == 4
    for _ in range(2):
        # Steps 3 and 4 brought nothing already
        scripted(done=3)
        assert run(tmp_path, data, tiny_llama(), resume="latest", **settings).steps == 4
    other, checkpoint = folder(tmp_path, "b"), str(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(FocusResumeError, match="checkpoint-2"):
        run(other, data, tiny_llama(), resume=checkpoint, **settings)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"early_stopping_patience": 2}, "early_stopping_patience"),
        ({"metric_for_best_model": "beauty", "eval_steps": 1}, "metric_for_best_model"),
    ],
)
def test_the_best_of_nothing_is_refused(
    tmp_path: Path, data: dict[str, Any], settings: dict[str, Any], argument: str
) -> None:
    with pytest.raises(FocusConfigError, match=argument):
        run(tmp_path, data, tiny_llama(), **settings)


def test_evaluation_and_checkpoints_change_nothing(tmp_path: Path, data: dict[str, Any]) -> None:
    plain = run(folder(tmp_path, "a"), data, tiny_llama(attention_dropout=0.1), max_steps=6)
    settings = {"eval_steps": 1, "save_steps": 1, "eval_at_start": True, "gradient_accumulation_steps": 1}
    watched = run(folder(tmp_path, "b"), data, tiny_llama(attention_dropout=0.1), max_steps=6, **settings)
    assert losses(watched) == losses(plain)
    state = watched.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.model.state_dict().items())


@pytest.mark.slow
def test_compiled_steps(tmp_path: Path, data: dict[str, Any]) -> None:
    # A compiled graph draws other random actions
    focus = FocusConfig(max_span=8, ramp=3, max_iterations=2, refiner=True, epsilon=0.0)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3}
    plain = run(folder(tmp_path, "a"), data, tiny_llama(), focus, **settings)
    compiled = run(
        folder(tmp_path, "b"), data, tiny_llama(), focus, torch_compile=True, torch_compile_backend="eager", **settings
    )
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "out").state_dict()
    assert loaded.keys() == plain.model.state_dict().keys()


def test_the_log_and_the_trackers_tell_what_focus_does(tmp_path: Path, data: dict[str, Any]) -> None:
    result = run(tmp_path, data, tiny_llama(), report_to=["tensorboard"])
    names = ["tokens_per_second", "peak_memory_bytes", "focus_span", "focus_iterations", "focus_entropy"]
    lines = [line for line in result.log if "loss" in line]
    for name in names:
        assert all(line[name] > 0 for line in lines), name
    # What a step taught is in the table when the next one has begun. The first two, of which one has the rate 0, find
    # the local output silent, and teach nothing
    assert [line["focus_table_drift"] > 0 for line in lines] == [False, False, False, True]
    (folder_of_run,) = (tmp_path / "out" / "trackers").iterdir()
    events = EventAccumulator(str(folder_of_run))
    events.Reload()
    for name in [*names, "loss", "focus_table_drift"]:
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-4), name
