"""Fine-tuning: every task, resumed equals uninterrupted, accumulated equals one batch, logs and evaluation."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from launch import finish, fork, run_script
from small_runs import (
    FOCUS,
    byte_tokenizer,
    folder,
    losses,
    run,
    source,
    texts,
    tiny_bert,
    tiny_bert_classifier,
    tiny_llama,
    tiny_llama_classifier,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_focus import FocusConfig, apply_focus
from hf_focus.arguments import DataArguments, ModelArguments, TrainArguments
from hf_focus.errors import FocusError
from hf_focus.modeling import FocusMixin
from hf_focus.training import finetune

SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"


TASKS = {
    "causal-lm": (tiny_llama, AutoModelForCausalLM, {"loss", "perplexity", "bits_per_byte", "accuracy"}),
    "masked-lm": (tiny_bert, AutoModelForMaskedLM, {"loss", "perplexity", "accuracy"}),
    "sequence-classification": (tiny_bert_classifier, AutoModelForSequenceClassification, {"loss", "accuracy"}),
}


@pytest.mark.parametrize("focus", [FOCUS, None], ids=["focus", "plain"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_its_folder_loads(
    tmp_path: Path, data: dict[str, Any], task: str, focus: FocusConfig | None
) -> None:
    build, auto_class, reported = TASKS[task]
    started = tmp_path / "start"
    build().save_pretrained(started)
    byte_tokenizer().save_pretrained(started)
    result = run(
        tmp_path,
        data,
        focus=focus,
        task=task,
        model_args={"model_name_or_path": str(started)},
        max_steps=6,
        eval_at_start=True,
    )
    loaded = auto_class.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, FocusMixin) == (focus is not None)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())
    assert reported <= set(result.metrics)
    first = next(line for line in result.log if "eval_loss" in line)
    assert result.metrics["loss"] < first["eval_loss"]
    if task == "sequence-classification":
        assert loaded.config.id2label == {0: "a", 1: "b"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        name: result.metrics[name] for name in reported
    }
    # The model came from a folder: neither its path nor any other of this machine is told
    assert "base_model" not in card.data.to_dict()
    assert str(tmp_path) not in str(card)
    assert not re.search(r"(/home/|/root|/tmp/|\\Users\\)", str(card))


@pytest.mark.parametrize(
    ("task", "build", "focus"),
    [
        ("causal-lm", lambda: tiny_llama(attention_dropout=0.2), FOCUS),
        ("masked-lm", tiny_bert, None),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, data: dict[str, Any], task: str, build: Any, focus: FocusConfig | None
) -> None:
    # 1 batch a step left over in each pass, and a checkpoint in the middle of the second pass
    settings = {"task": task, "max_steps": 7, "gradient_accumulation_steps": 2, "data_args": {"block_size": 32}}
    whole = run(folder(tmp_path, "a"), data, build(), focus, save_steps=2, save_limit=None, **settings)
    epochs = [line["epoch"] for line in whole.log if "loss" in line]
    for step in (2, 4, 6):
        target = folder(tmp_path, f"b{step}")
        checkpoint = str(tmp_path / "a" / "out" / f"checkpoint-{step}")
        resumed = run(target, data, build(), focus, resume=checkpoint, **settings)
        assert losses(resumed) == {k: v for k, v in losses(whole).items() if k > step}
        assert [line["epoch"] for line in resumed.log if "loss" in line] == epochs[step:]
        state = resumed.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    assert max(epochs) > 1
    assert len(set(losses(whole).values())) == 7


def test_latest_goes_on_in_the_same_folder(tmp_path: Path, data: dict[str, Any]) -> None:
    whole = run(tmp_path, data, tiny_llama(), max_steps=5, save_steps=2, save_limit=1)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    # What a crash leaves: half a checkpoint under its temporary name, one without its last file
    shutil.copytree(out / "checkpoint-4", out / "partial-checkpoint-6")
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-8")
    (out / "checkpoint-8" / "run.json").unlink()
    again = run(tmp_path, data, tiny_llama(), max_steps=5, save_steps=2, save_limit=1, resume="latest")
    assert losses(again) == losses(whole)
    lines = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert lines == again.log
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier])
def test_accumulation_equals_one_batch(tmp_path: Path, data: dict[str, Any], build: Any) -> None:
    task = "causal-lm" if build is tiny_llama else "sequence-classification"
    # Blocks of unequal length: the mean of means would differ from the mean. Of blocks of more than 32 tokens the
    # refiner looks at some queries, which padding shifts
    focus = FocusConfig(max_span=8, ramp=3, max_iterations=2, span_penalty=0.1)
    model_settings = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    results = []
    for number, (batch_size, steps) in enumerate([(2, 1), (1, 2)]):
        model = build()
        for name, value in model_settings.items():
            setattr(model.config, name, value)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        results.append(
            run(
                folder(tmp_path, str(number)),
                data,
                model,
                focus if build is tiny_llama else None,
                task=task,
                batch_size=batch_size,
                gradient_accumulation_steps=steps,
                learning_rate=1e-3,
                max_steps=8,
                data_args={"block_size": 29, "eval_share": 0.0},
            )
        )
    one, two = (losses(result) for result in results)
    assert one == pytest.approx(two, abs=1e-5)
    assert len(one) == 8


def test_the_model_sees_uneven_batches_as_the_test_above_wants(data: dict[str, Any]) -> None:
    from hf_focus.data import load_documents
    from hf_focus.tasks import find_task

    rows = load_documents(DataArguments(**data))[0]
    lengths = [
        len(ids) for ids in find_task("causal-lm").encode(rows, None, source(), DataArguments(), 29).train["input_ids"]
    ]
    assert lengths[-1] < lengths[0] == 29


def test_trackers_and_log(tmp_path: Path, data: dict[str, Any]) -> None:
    result = run(tmp_path, data, tiny_llama(), report_to=["tensorboard"], eval_steps=2)
    files = list((tmp_path / "out" / "trackers").rglob("events.out.tfevents*"))
    assert any(path.stat().st_size > 500 for path in files)
    steps = [line for line in result.log if "loss" in line]
    for key in ("loss", "learning_rate", "seconds", "tokens_per_second", "peak_memory_bytes", "grad_norm"):
        assert all(line[key] >= 0 for line in steps)
    assert [line["step"] for line in result.log if "eval_bits_per_byte" in line] == [2, 4]
    assert steps[-1]["learning_rate"] == 0 < max(line["learning_rate"] for line in steps)


def test_autocast_reaches_nearly_the_same(tmp_path: Path, data: dict[str, Any]) -> None:
    # Both in one process, one after the other; exploration would meet other numbers
    focus = FocusConfig(max_span=8, ramp=3, max_iterations=2, refiner=True, epsilon=0.0)
    reference = run(folder(tmp_path, "a"), data, tiny_llama(), focus)
    other = run(folder(tmp_path, "b"), data, tiny_llama(), focus, mixed_precision="bf16")
    assert losses(other) == pytest.approx(losses(reference), abs=0.05)
    assert {p.dtype for p in other.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_reaches_the_same(tmp_path: Path, data: dict[str, Any]) -> None:
    runs, computed = [], []
    for checkpointing in (False, True):
        model, calls = tiny_llama(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        settings = {"model_args": {"gradient_checkpointing": checkpointing}, "gradient_accumulation_steps": 2}
        runs.append(run(folder(tmp_path, str(checkpointing)), data, model, **settings))
        computed.append(len(calls))
    reference, other = runs
    # Each of the 4 × 2 batches is computed again
    assert computed[1] - computed[0] == 8
    assert losses(other) == pytest.approx(losses(reference), abs=1e-5)
    state = other.model.state_dict()
    for name, value in reference.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5, msg=name)
    assert not other.model.is_gradient_checkpointing


def test_without_evaluation_data_there_are_no_results(tmp_path: Path, data: dict[str, Any]) -> None:
    train = {"train_files": data["train_files"]}
    result = run(tmp_path, train, tiny_llama(), data_args={"eval_share": 0.0}, eval_steps=2)
    assert result.metrics == {}
    assert "model-index" not in (tmp_path / "out" / "README.md").read_text()
    held_out = run(folder(tmp_path, "b"), train, tiny_llama(), data_args={"eval_share": 0.3})
    assert held_out.metrics["bits_per_byte"] > 0


def test_data_sets_in_memory_equal_files(tmp_path: Path, data: dict[str, Any]) -> None:
    from_files = run(tmp_path, {"train_files": data["train_files"]}, tiny_llama(), data_args={"eval_share": 0.3})
    in_memory = finetune(
        ModelArguments(),
        DataArguments(block_size=16, cache_dir=str(tmp_path / "cache"), eval_share=0.3),
        TrainArguments(
            output_dir=str(tmp_path / "b"),
            max_steps=4,
            batch_size=2,
            logging_steps=1,
            learning_rate=1e-2,
            progress_bar=False,
            cpu=True,
        ),
        FOCUS,
        model=tiny_llama(),
        tokenizer=byte_tokenizer(),
        train_dataset=Dataset.from_dict({"text": texts(9)}),
    )
    assert losses(in_memory) == losses(from_files)
    assert in_memory.metrics == from_files.metrics


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, data: dict[str, Any]) -> None:
    tiny_llama().save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    # Documents, batches and evaluation blocks that two processes cannot share evenly
    settings = {**data, "model_name_or_path": "start", "max_steps": 4, "block_size": 37, "max_span": 8, "ramp": 3}
    settings |= {"max_iterations": 2, "epsilon": 0.0, "cpu": True, "logging_steps": 1, "learning_rate": 1e-2}
    logs = []
    for count in (1, 2):
        values = {**settings, "output_dir": f"out{count}", "batch_size": 2 // count, "num_processes": count}
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        command = [sys.executable, *launch, str(SCRIPT), "run.yaml", "--cache-dir", "cache"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"out{count}" / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, two in zip(*logs, strict=True):
        # The recorded figures of FocusA are of the first batch, and that is another one
        same = [
            key
            for key in one
            if key not in ("tokens_per_second", "seconds", "peak_memory_bytes") and "focus" not in key
        ]
        assert {key: two[key] for key in same} == pytest.approx({key: one[key] for key in same}, rel=1e-4)


def test_a_diverged_run_stops(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(FocusError, match="learning-rate"):
        run(tmp_path, data, tiny_llama(), learning_rate=1e30, max_grad_norm=None, max_steps=20)


def test_the_script_trains_and_refuses(tmp_path: Path, data: dict[str, Any]) -> None:
    tiny_llama().save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    settings = {
        **data,
        "model_name_or_path": "start",
        "output_dir": "out",
        "max_steps": 2,
        "block_size": 16,
        "max_span": 8,
        "cpu": True,
        "cache_dir": "cache",
        "license": "mit",
        "language": ["en"],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    codes = []
    for flags in ((), ("--max-span", "0")):
        codes += finish([fork(run_script, SCRIPT, str(tmp_path), "run.yaml", *flags)])
        printed = [(tmp_path / name).read_text() for name in ("stdout0", "stderr0")]
        assert ("bits_per_byte" in printed[0]) == (not flags), printed
    assert codes == [0, 2]
    assert "`max_span` got 0" in printed[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").focus_config.max_span == 8
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def test_the_trainer_of_transformers_takes_a_patched_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [tokenizer(text, max_length=16, truncation=True, padding="max_length") for text in texts(8)]
    dataset = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    model = apply_focus(tiny_llama(), FOCUS)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    before = trainer.evaluate()["eval_loss"]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, FocusMixin)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not torch.equal(state[name], start[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_a_llama_classifier_pads_and_trains(tmp_path: Path, data: dict[str, Any]) -> None:
    result = run(tmp_path, data, tiny_llama_classifier(), task="sequence-classification", batch_size=3)
    assert 0 <= result.metrics["accuracy"] <= 1
