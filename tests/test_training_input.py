"""Fine-tuning: settings, and what is refused before anything is changed."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from small_runs import (
    FOCUS,
    folder,
    run,
    tiny_llama,
)

from hf_focus import FocusConfig
from hf_focus.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments
from hf_focus.errors import FocusConfigError, FocusDataError, FocusResumeError, NoMatchingLayerError
from hf_focus.modeling import FocusMixin


@pytest.mark.parametrize("change", ["learning_rate", "focus", "data", "model", "garbage", "missing", "latest"])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, data: dict[str, Any], change: str) -> None:
    run(folder(tmp_path, "a"), data, tiny_llama(), max_steps=2, save_steps=2)
    checkpoint = tmp_path / "a" / "out" / "checkpoint-2"
    settings: dict[str, Any] = {"max_steps": 2, "resume": str(checkpoint)}
    model, focus, expected = tiny_llama(), FOCUS, change
    if change == "learning_rate":
        settings["learning_rate"] = 2e-2
    elif change == "focus":
        focus, expected = FocusConfig(max_span=9, ramp=3, max_iterations=2), "max_span"
    elif change == "data":
        # The first of the documents is longer by one letter
        path = Path(data["train_files"][0])
        path.write_text(path.read_text().replace('"text": "', '"text": "x', 1))
        expected = "training_data"
    elif change == "model":
        model, expected = tiny_llama(rms_norm_eps=1e-5), "model_config"
    elif change == "garbage":
        (checkpoint / "run.json").write_text("{")
        expected = "readable"
    else:
        settings["resume"] = str(tmp_path) if change == "missing" else "latest"
        expected = "checkpoint"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = folder(tmp_path, "b")
    with pytest.raises(FocusResumeError, match="resume") as caught:
        run(target, data, model, focus, **settings)
    assert expected in str(caught.value)
    # Nothing was changed
    assert not isinstance(model, FocusMixin)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    assert not (target / "out").exists()


BAD = {
    "task": ({"task": "cooking"}, FocusConfigError, "task"),
    "rate": ({"learning_rate": -1.0}, FocusConfigError, "learning_rate"),
    "schedule": ({"schedule": "zigzag"}, FocusConfigError, "schedule"),
    "precision": ({"mixed_precision": "fp16"}, FocusConfigError, "mixed_precision"),
    "tracker": ({"report_to": ["smoke-signals"]}, FocusConfigError, "report_to"),
    "processes": ({"num_processes": 7}, FocusConfigError, "num_processes"),
    "nothing to train": ({"focus": None, "model_args": {"freeze_base": True}}, FocusConfigError, "freeze_base"),
    "lora": ({"model_args": {"freeze_base": True, "lora_rank": 2}}, FocusConfigError, "lora_rank"),
    "lora targets": (
        {"model_args": {"lora_rank": 2, "lora_targets": ["x"]}},
        FocusConfigError,
        "lora_targets",
    ),
    "license": ({"model_args": {"license": "mine"}}, FocusConfigError, "license"),
    "block": ({"data_args": {"block_size": 65}}, FocusConfigError, "block_size"),
    "layers": ({"focus": FocusConfig(layers=[7])}, NoMatchingLayerError, "layers"),
    "file": ({"data_args": {"train_files": ["none.txt"]}}, FocusDataError, "train_files"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_changed(tmp_path: Path, data: dict[str, Any], case: str) -> None:
    changes, error, argument = BAD[case]
    model = tiny_llama()
    with pytest.raises(error, match=argument):
        run(tmp_path, data, model, **changes)
    assert not isinstance(model, FocusMixin)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "argument"),
    [
        ("FSDP", {"model_args": {"lora_rank": 2}}, "lora_rank"),
        ("DEEPSPEED", {"model_args": {"lora_rank": 2}}, "lora_rank"),
        ("DEEPSPEED", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, changes: Any, argument: str
) -> None:
    # Neither is started on a CPU: a run is told of it
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    model = tiny_llama()
    with pytest.raises(FocusConfigError, match=f"`{argument}` got 2"):
        run(tmp_path, data, model, **changes)
    assert not isinstance(model, FocusMixin)
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path: Path, data: dict[str, Any]) -> None:
    first = run(tmp_path, data, tiny_llama(), save_steps=2)
    with pytest.raises(FocusConfigError, match="output_dir"):
        run(tmp_path, data, tiny_llama())
    second = run(tmp_path, data, tiny_llama(), overwrite_output_dir=True, max_steps=2)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert len(second.log) < len(first.log)


def test_flags_and_files_give_the_same_arguments(tmp_path: Path) -> None:
    line = "--model-name-or-path m --output-dir o --learning-rate 1e-4 --layers 0 2 --no-focus --train-files a b"
    flags = parse_arguments(line.split())
    values = {"model_name_or_path": "m", "output-dir": "o", "learning_rate": 1e-4, "layers": [0, 2], "focus": False}
    values["train_files"] = ["a", "b"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(json.dumps(values).replace("0.0001", "1e-4"))
    for name in ("run.json", "run.yaml"):
        assert parse_arguments([str(tmp_path / name)]) == flags
        assert parse_arguments([str(tmp_path / name), "--learning-rate", "2"])[2].learning_rate == 2
    assert flags[3].to_config() == FocusConfig(layers=[0, 2])
    (tmp_path / "bad.yaml").write_text("learning_rte: 1")
    (tmp_path / "list.yaml").write_text("[1]")
    for name in ("bad.yaml", "list.yaml", "missing.yaml"):
        with pytest.raises(FocusConfigError, match=name):
            parse_arguments([str(tmp_path / name)])


def test_arguments_given_to_python_are_checked() -> None:
    with pytest.raises(FocusConfigError, match="output_dir"):
        TrainArguments()
    with pytest.raises(FocusConfigError, match="train_files"):
        DataArguments(train_files="a.txt")
    with pytest.raises(FocusConfigError, match="dtype"):
        ModelArguments(dtype="int8")
