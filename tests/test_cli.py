"""The command line: every command end to end, exit codes, messages, and that nothing half-written stays."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import distribution
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from small_runs import WORDS, byte_tokenizer, texts, tiny_bert_classifier, tiny_llama
from tiny import TINY, logits, randomize
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hf_focus.sharing
from hf_focus import FocusConfig, apply_focus
from hf_focus.cli import COMMANDS, main
from hf_focus.errors import FocusDataError
from hf_focus.folders import load_model
from hf_focus.scoring import label_numbers

FOCUS_FLAGS = ("--max-span", "8", "--ramp", "3", "--max-iterations", "2")
IDS = torch.arange(10, 40)[None]


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model with a tokenizer, settings for generation, a chat template, and files of no concern."""
    folder = save(tiny_llama(), tmp_path_factory.mktemp("plain") / "model")
    GenerationConfig(max_new_tokens=3, eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.md").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def focused(plain: Path) -> Path:
    """The same model with a FocusA that acts."""
    model = randomize(apply_focus(LlamaForCausalLM.from_pretrained(plain), max_span=8, ramp=3, max_iterations=2))
    return save(model, plain.parent / "focused")


@pytest.fixture(scope="module")
def book(plain: Path) -> Path:
    path = plain.parent / "book.txt"
    path.write_text("\n".join(texts(40)))
    return path


def run(argv: Sequence[object]) -> int:
    return main([str(part) for part in argv])


def same_state(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return list(first) == list(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(command.summary)}$", shown, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  hf-focus {name} " in shown, "an example to copy"
    assert COMMANDS[name].run.__doc__.splitlines()[0] in shown
    assert COMMANDS[name].usage in shown


@pytest.mark.parametrize("name", ["patch", "finetune"])
def test_every_setting_is_a_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    shown = capsys.readouterr().out
    for setting in fields(FocusConfig):
        assert re.search(rf"--{setting.name.replace('_', '-')}\b", shown), setting.name


def test_the_installed_script_is_this_main() -> None:
    (script,) = distribution("hf_focus").entry_points.select(group="console_scripts", name="hf-focus")
    assert script.load() is main


@pytest.mark.parametrize("argv", [[], ["focus"], ["patch"], ["patch", "model", "out", "--max-spam", "3"]])
def test_argparse_refuses_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "usage: hf-focus" in shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hf-focus {hf_focus.__version__}"


def test_patch(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert run(["patch", plain, out, *FOCUS_FLAGS, "--layers", 1, "--refiner"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    model, before = AutoModelForCausalLM.from_pretrained(out), LlamaForCausalLM.from_pretrained(plain)
    assert type(model).__name__ == "FocusLlamaForCausalLM"
    assert model.focus_config == FocusConfig(max_span=8, ramp=3, max_iterations=2, layers=[1], refiner=True)
    assert torch.equal(logits(model, input_ids=IDS), logits(before, input_ids=IDS))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert model.generation_config.max_new_tokens == 3
    assert not (out / "notes.md").exists()
    assert AutoTokenizer.from_pretrained(out)("fox")["input_ids"] == byte_tokenizer()("fox")["input_ids"]


@pytest.mark.parametrize("named", [None, "LlamaTokenizerFast", "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "phi3", "bert"])
def test_the_tokenizer_is_the_plain_model_s(model_type: str, named: str | None, tmp_path: Path) -> None:
    """Also where its files name no class, or another than the one that transformers takes for the model type."""
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": named}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    model = TINY[model_type].build()
    model.config.save_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    apply_focus(model).config.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(expected)
    assert found("fox")["input_ids"] == expected("fox")["input_ids"]


def test_patch_keeps_the_dtype_and_takes_another_class(plain: Path, tmp_path: Path) -> None:
    half = LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert run(["patch", tmp_path / "half", tmp_path / "out", "--auto-class", "AutoModel"]) == 0
    model = load_model(str(tmp_path / "out"))
    assert type(model).__name__ == "FocusLlamaModel"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_of_images_is_patched_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY["vit"].build().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{}")
    assert run(["patch", tmp_path / "vit", tmp_path / "out", "--span-granularity", "sequence"]) == 0
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    capsys.readouterr()
    assert run(["inspect", tmp_path / "out", "--json"]) == 0
    shown = capsys.readouterr()
    assert "nothing is measured" in shown.err
    found = json.loads(shown.out)
    assert [layer["measures"] for layer in found["layers"]] == [None, None]


def test_unpatch_gives_the_original(plain: Path, focused: Path, tmp_path: Path) -> None:
    assert run(["unpatch", focused, tmp_path / "out"]) == 0
    model, original = load_model(str(tmp_path / "out")), LlamaForCausalLM.from_pretrained(plain)
    assert type(model) is LlamaForCausalLM
    assert same_state(model, original)
    assert (tmp_path / "out" / "config.json").read_text() == (plain / "config.json").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in plain.iterdir() if path.name not in ("notes.md", "chat_template.jinja")
    )


def test_an_existing_folder_stays_unless_told(plain: Path, focused: Path, tmp_path: Path) -> None:
    out = save(tiny_llama(), tmp_path / "out")
    (out / "stale.txt").write_text("from before")
    assert run(["patch", plain, out]) == 2
    assert type(load_model(str(out))) is LlamaForCausalLM
    assert run(["patch", plain, out, *FOCUS_FLAGS, "--overwrite"]) == 0
    assert load_model(str(out)).focus_config.max_span == 8
    assert not (out / "stale.txt").exists()
    # In its own place
    assert run(["unpatch", out, out, "--overwrite"]) == 0
    assert type(load_model(str(out))) is LlamaForCausalLM
    assert (out / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_deletes_nothing_but_models(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run(["patch", plain, tmp_path, "--overwrite"]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert run(["patch", plain, tmp_path / "thesis.txt", "--overwrite"]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert capsys.readouterr().err.count("hf-focus patch: `out` got") == 2
    (tmp_path / "empty").mkdir()
    assert run(["patch", plain, tmp_path / "empty", "--overwrite"]) == 0


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_write_leaves_no_folder(
    there: bool, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if there:
        save(tiny_llama(), out)
    before = sorted(tmp_path.rglob("*"))
    written = []

    def fail(self: PreTrainedModel, folder: Path, **kwargs: object) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        written.append(folder)
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    assert run(["patch", plain, out, "--overwrite"]) == 1
    assert len(written) == 1
    assert "RuntimeError: the disk is full" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["patch", "{plain}/nothing", "{out}"], "`model` got"),
        (["patch", "{plain}", "{out}", "--max-span", "0"], "`max_span` got 0"),
        (["patch", "{plain}", "{out}", "--layers", "7"], "`layers` got [7]"),
        (["patch", "{plain}", "{out}", "--auto-class", "AutoModelForNothing"], "`auto_class` got"),
        (["patch", "{focused}", "{out}"], "FocusLlamaForCausalLM"),
        (["unpatch", "{plain}", "{out}"], "LlamaForCausalLM"),
        (["finetune", "--model-name-or-path", "{plain}"], "`output_dir` got ''"),
        (["finetune", "--output-dir", "{out}", "--learning-rat", "1", "--nonsense"], "--nonsense"),
        (["finetune", "missing.yaml"], "missing.yaml"),
        (["finetune", "{broken}"], "a well-formed file"),
        (["evaluate", "{plain}"], "--eval-files"),
        (["evaluate", "{plain}", "--train-files", "{book}", "--eval-share", "0"], "`eval_share` got"),
        (["evaluate", "{plain}", "--eval-files", "{book}", "--batch-size", "0"], "`batch_size` got 0"),
        (["evaluate", "{plain}/nothing", "--eval-files", "{book}"], "nothing"),
        (["inspect", "{plain}"], "LlamaForCausalLM"),
        (["inspect", "{focused}", "--text", "missing.txt"], "`text` got 'missing.txt'"),
        (["inspect", "{focused}", "--map-tokens", "0"], "`map_tokens` got 0"),
        (["inspect", "{focused}", "--block-size", "65"], "at most 64"),
        (["push", "{plain}/nothing", "me/model"], "nothing"),
    ],
)
def test_bad_input_is_told_in_one_line_with_2(
    argv: list[str],
    said: str,
    plain: Path,
    focused: Path,
    book: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path_factory.mktemp("settings") / "broken.yaml"
    broken.write_text("max_steps: [1\nseed: }")
    names = {"plain": plain, "focused": focused, "book": book, "broken": broken, "out": tmp_path / "out"}
    assert main([part.format(**names) for part in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.splitlines()[-1]
    assert last.startswith(f"hf-focus {argv[0]}: ")
    assert said in last
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_never_trained_is_not_scored(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts(4))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("--task", "sequence-classification", "--eval-files", tmp_path / "rows.jsonl")
    assert run(["evaluate", plain, *task]) == 2
    assert "score.weight would be random" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json"])
def test_evaluate_repeats_what_finetune_reported(
    form: str, plain: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ("--train-files", book, "--block-size", 16, "--cache-dir", tmp_path / "cache", "--eval-share", 0.2)
    training = ("--max-steps", 2, "--cpu", "--learning-rate", 0.01, "--no-progress-bar")
    argv = ["finetune", "--model-name-or-path", plain, "--output-dir", out, *common, *training, *FOCUS_FLAGS]
    assert run(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    expected = {key.removeprefix("eval_"): value for key, value in log[-1].items() if key.startswith("eval_")}
    assert run(["evaluate", out, *common, "--cpu", "--batch-size", 3, *(["--json"] if form == "json" else [])]) == 0
    shown = capsys.readouterr().out
    if form == "json":
        found = json.loads(shown)
    else:
        found = {name: float(value) for name, value in (line.split() for line in shown.splitlines())}
    assert {"loss", "perplexity", "bits_per_byte", "accuracy", "focus_span"} <= set(found)
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["plain", "focused"])
def test_evaluate_measures_claims(
    kind: str, request: pytest.FixtureRequest, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(kind)
    assert run(["evaluate", model, "--claims", "--json", "--cpu", "--block-size", 32, "--max-eval-examples", 2]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["claim_entropy_share"] <= 1
    assert ("claim_local_entropy" in found) == (kind == "focused")
    assert "loss" not in found
    data = ("--eval-files", book, "--cache-dir", tmp_path / "cache", "--block-size", 16)
    assert run(["evaluate", model, "--claims", "--json", "--cpu", *data]) == 0
    assert {"loss", "claim_rank_residual"} <= set(json.loads(capsys.readouterr().out))


def test_evaluate_reads_labels_as_the_model_numbers_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = tiny_bert_classifier().eval()
    # Not the order in which the data alone would number them
    model.config.id2label, model.config.label2id = {0: "night", 1: "day"}, {"night": 0, "day": 1}
    save(model, tmp_path / "model")
    tokenizer = byte_tokenizer()
    rows = []
    for text in (f"{one} {two}" for one in WORDS[:4] for two in WORDS[4:8]):
        best = logits(model, **tokenizer(text, return_tensors="pt")).argmax().item()
        rows.append({"text": text, "label": model.config.id2label[best]})
    argv = ["evaluate", tmp_path / "model", "--task", "sequence-classification", "--json", "--cpu"]
    argv += ["--eval-files", tmp_path / "rows.jsonl", "--cache-dir", tmp_path / "cache"]
    # One label is wrong, so that the data holds both
    rows[0]["label"] = {"night": "day", "day": "night"}[rows[0]["label"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(argv) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(1 - 1 / len(rows))


def test_label_numbers() -> None:
    named = BertConfig(id2label={0: "b", 1: "a", 2: "c"}, label2id={"b": 0, "a": 1, "c": 2})
    assert label_numbers(["a", "b"], None, named) == {"a": 1, "b": 0}
    assert label_numbers([0, 1], ["a", "b"], named) == {0: 1, 1: 0}
    assert label_numbers([0, 2], None, named) == {0: 0, 2: 2}
    assert label_numbers([0, 2], ["x", "y", "z"], named) == {0: 0, 2: 2}
    stars = BertConfig(id2label={0: "1", 1: "2"}, label2id={"1": 0, "2": 1})
    assert label_numbers([1, 2], None, stars) == {1: 0, 2: 1}
    for values, names in ((["a", "x"], None), ([3], None), ([-1], ["a", "b"]), ([3], ["w", "x", "y", "z"])):
        with pytest.raises(FocusDataError, match="label_column"):
            label_numbers(values, names, named)


def test_inspect_prints_text(focused: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", focused, "--text", book, "--cpu"]) == 0
    shown = capsys.readouterr().out
    assert "FocusLlamaForCausalLM (llama)" in shown
    assert "2 of 2 patched" in shown
    assert "on 1 texts, 64 tokens" in shown
    assert "max_span=8" in shown
    assert len(re.findall(r"^model\.layers\.\d\.self_attn", shown, re.MULTILINE)) == 2


def test_inspect_takes_the_data_of_evaluation(
    focused: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--eval-files", book, "--sample-by", "line", "--max-eval-examples", 5, "--block-size", 8)
    assert run(["inspect", focused, *flags, "--cache-dir", tmp_path, "--cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 5
    # Cut to 8, 4, 2, 1 and again 8 tokens
    assert found["tokens"] == 23


def test_inspect_defaults_to_the_standard_library(
    focused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run(["inspect", focused, "--cpu", "--html", tmp_path / "page.html", "--map-tokens", 4]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "page.html")]
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "standard library" in page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_push_calls_the_library(
    focused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It takes only what the real one takes
    pushed = create_autospec(hf_focus.sharing.push_folder, return_value="https://hub/me/model/commit/1")
    monkeypatch.setattr(hf_focus.sharing, "push_folder", pushed)
    assert run(["push", focused, "me/model", "--private", "--revision", "next", "--commit-message", "m"]) == 0
    assert capsys.readouterr().out == "https://hub/me/model/commit/1\n"
    asked = {"private": True, "revision": "next", "commit_message": "m", "overwrite": False}
    assert pushed.call_args.kwargs == {"folder": str(focused), "repo_id": "me/model", **asked}
    assert run(["push", focused, "me/model"]) == 0
    assert pushed.call_args.kwargs["private"] is None
