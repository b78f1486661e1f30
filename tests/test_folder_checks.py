"""Folders before they are shared: whole ones of every architecture pass; damaged and talkative ones do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import FOCUS, byte_tokenizer, tiny_bert, tiny_llama
from tiny import SETTINGS, TINY
from transformers import AutoModelForCausalLM

from hf_focus import apply_focus
from hf_focus.cards import CardFacts, model_card
from hf_focus.errors import FocusCheckpointError, FocusConfigError, FocusError, FocusHubError
from hf_focus.folder_checks import check_folder, refuse_traces
from hf_focus.sharing import drop_stale_weights, replace_model

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_of_every_architecture_passes(tmp_path: Path, name: str) -> None:
    apply_focus(TINY[name].build(), SETTINGS).save_pretrained(tmp_path, max_shard_size="300KB")
    checked = check_folder(tmp_path)
    assert checked.kind == "model"
    assert "model.safetensors.index.json" in checked.files
    assert checked.card is None
    refuse_traces(checked)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, and in one file, and an adapter."""
    folder = tmp_path_factory.mktemp("saved")
    model = apply_focus(tiny_llama(), FOCUS)
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    model.save_pretrained(folder / "single")
    byte_tokenizer().save_pretrained(folder / "single")
    model_card(CardFacts("m", "text-generation", focus=FOCUS.to_dict())).save(folder / "single" / "README.md")
    from hf_focus import FocusAdapterConfig

    base = tiny_llama()
    base.config.name_or_path = base.name_or_path = "someone/some-model"
    adapted = peft.get_peft_model(base, FocusAdapterConfig(focus_config=FOCUS.to_dict(), task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    return folder


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def move_a_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(tensor for tensor, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SHARD = "model-00001-of-00003.safetensors"
ADAPTER = "adapter_model.safetensors"
DAMAGED: dict[str, tuple[str, Callable[[Path], None], type[FocusError], str]] = {
    "no config": ("single", remove("config.json"), FocusCheckpointError, "config.json"),
    "no weights": ("single", remove("model.safetensors"), FocusCheckpointError, "weights"),
    "truncated": ("single", edit_bytes("model.safetensors", lambda b: b[:-9]), FocusCheckpointError, "whole"),
    "longer": ("single", edit_bytes("model.safetensors", lambda b: b + b"more"), FocusCheckpointError, "whole"),
    "empty": ("single", edit_bytes("model.safetensors", lambda b: b""), FocusCheckpointError, "whole"),
    "header": (
        "single",
        edit_bytes("model.safetensors", lambda b: b[:8] + b"!" + b[9:]),
        FocusCheckpointError,
        "whole",
    ),
    "length": (
        "single",
        edit_bytes("model.safetensors", lambda b: b"\xff" * 8 + b[8:]),
        FocusCheckpointError,
        "whole",
    ),
    "renamed tensor": (
        "single",
        edit_bytes("model.safetensors", lambda b: b.replace(b"lm_head.weight", b"lm_heed.weight")),
        FocusCheckpointError,
        "lm_heed.weight",
    ),
    "missing shard": ("sharded", remove(SHARD), FocusCheckpointError, SHARD),
    "missing index": ("sharded", remove("model.safetensors.index.json"), FocusCheckpointError, "weights"),
    "both": ("sharded", write("model.safetensors", "old"), FocusCheckpointError, "either"),
    "index": ("sharded", edit_json("model.safetensors.index.json", weight_map=3), FocusCheckpointError, "weight_map"),
    "moved": ("sharded", move_a_tensor, FocusCheckpointError, SHARD),
    "not JSON": ("single", write("config.json", "{model"), FocusCheckpointError, "config.json"),
    "a list": ("single", write("config.json", "[]"), FocusCheckpointError, "config.json"),
    "plain": ("single", edit_json("config.json", model_type="llama"), FocusCheckpointError, "model_type"),
    "unknown": ("single", edit_json("config.json", model_type="focus_x"), FocusCheckpointError, "model_type"),
    "numeric type": ("single", edit_json("config.json", model_type=7), FocusCheckpointError, "model_type"),
    "class": ("single", edit_json("config.json", architectures=["Pipeline"]), FocusCheckpointError, "architectures"),
    "no class": ("single", edit_json("config.json", architectures=None), FocusCheckpointError, "architectures"),
    "text for size": ("single", edit_json("config.json", hidden_size="wide"), FocusCheckpointError, "hidden_size"),
    "negative": ("single", edit_json("config.json", vocab_size=-3), FocusCheckpointError, "config.json"),
    "no heads": ("single", edit_json("config.json", num_attention_heads=0), FocusCheckpointError, "config.json"),
    "other size": ("single", edit_json("config.json", hidden_size=64), FocusCheckpointError, "another shape"),
    "more layers": ("single", edit_json("config.json", num_hidden_layers=3), FocusCheckpointError, "missing"),
    "endless": ("single", edit_json("config.json", num_hidden_layers=10**9), FocusCheckpointError, "layers"),
    "focus settings": (
        "single",
        edit_json("config.json", focus_config={"max_span": 0}),
        FocusCheckpointError,
        "max_span",
    ),
    "other layers": (
        "single",
        edit_json("config.json", focus_config={**FOCUS.to_dict(), "layers": [0]}),
        FocusCheckpointError,
        "not of this model",
    ),
    "card": ("single", write("README.md", "---\nlicense: mine\n---\n"), FocusConfigError, "license"),
    "card of a folder": ("single", write("README.md", "---\nbase_model: /x/y\n---\n"), FocusConfigError, "base_model"),
    "two kinds": ("single", write("adapter_config.json", "{}"), FocusCheckpointError, "either"),
    "adapter of another type": (
        "adapter",
        edit_json("adapter_config.json", peft_type="LORA"),
        FocusCheckpointError,
        "LORA",
    ),
    "adapter on a folder": (
        "adapter",
        edit_json("adapter_config.json", base_model_name_or_path="/home/me/base"),
        FocusConfigError,
        "base_model_name_or_path",
    ),
    "adapter's settings": (
        "adapter",
        edit_json("adapter_config.json", focus_config={"max_span": "far"}),
        FocusConfigError,
        "max_span",
    ),
    "adapter truncated": ("adapter", edit_bytes(ADAPTER, lambda b: b[:-1]), FocusCheckpointError, "whole"),
    "adapter without weights": ("adapter", remove(ADAPTER), FocusCheckpointError, "weights"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(tmp_path: Path, saved: Path, case: str) -> None:
    kind, damage, error, words = DAMAGED[case]
    shutil.copytree(saved / kind, tmp_path / "folder")
    check_folder(tmp_path / "folder")
    damage(tmp_path / "folder")
    with pytest.raises(error, match=words):
        check_folder(tmp_path / "folder")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FocusCheckpointError, match="nowhere"):
        check_folder(tmp_path / "nowhere")
    tiny_bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(FocusCheckpointError, match="bert"):
        check_folder(tmp_path / "plain")


def test_only_what_belongs_to_the_model_is_shared(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved / "single", tmp_path / "out")
    before = set(check_folder(tmp_path / "out").files)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling.py"} <= before
    for name in ("optimizer.pt", "training_args.bin", "run.json", ".env", "notes.txt", "events.out.tfevents.1"):
        (tmp_path / "out" / name).write_text("x")
    for name in ("checkpoint-2", "trackers", "additional_chat_templates", "__pycache__"):
        (tmp_path / "out" / name).mkdir()
        for file in ("model.safetensors", "config.json", "x.jinja", "x.py"):
            (tmp_path / "out" / name / file).write_text("x")
    assert set(check_folder(tmp_path / "out").files) == before | {"additional_chat_templates/x.jinja"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "see /home/somebody/model"),
        ("README.md", "C:\\Users\\somebody\\model"),
        ("train_log.jsonl", '{"step": 1, "path": "FOLDER"}'),
        ("config.json", '"FOLDER/x"'),
        ("generation_config.json", '{"from": "/tmp/run-3/start"}'),
        ("tokenizer_config.json", '{"name_or_path": "/Users/somebody/x"}'),
        ("notes.md", "file:///root/x"),
        ("LICENSE", "HOME"),
    ],
)
def test_paths_of_a_machine_are_refused(tmp_path: Path, saved: Path, name: str, text: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(saved / "single", folder)
    refuse_traces(check_folder(folder))
    text = text.replace("FOLDER", str(folder)).replace("HOME", str(Path.home()))
    if name == "config.json":
        edit_json(name, note=json.loads(text))(folder)
    else:
        with (folder / name).open("a") as file:
            file.write(text)
    with pytest.raises(FocusHubError, match=name):
        refuse_traces(check_folder(folder))


def test_words_that_only_look_like_paths_pass(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved / "single", tmp_path / "out")
    with (tmp_path / "out" / "README.md").open("a") as file:
        file.write("https://example.com/home/me and a/tmp/x, the /home page, /tmp, root@ and ~/models\n")
    # A vocabulary of code holds paths
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["/home/user/x"] = 999
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "out" / "vocab.txt").write_text("/tmp/x\n")
    refuse_traces(check_folder(tmp_path / "out"))


def test_older_weights_are_dropped(tmp_path: Path) -> None:
    model = apply_focus(tiny_llama(), FOCUS)
    model.save_pretrained(tmp_path / "a")
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "b", max_shard_size="200KB")
    # As a save in shards after one in a single file leaves it
    for file in sorted((tmp_path / "b").glob("model*")):
        shutil.copy(file, tmp_path / "a" / file.name)
    drop_stale_weights(tmp_path / "a")
    check_folder(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.lm_head.weight.equal(model.lm_head.weight)
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    drop_stale_weights(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before


def test_a_model_replaces_another_and_leaves_the_rest(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved / "sharded", tmp_path / "out")
    (tmp_path / "out" / "train_log.jsonl").write_text("{}\n")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    shutil.copytree(saved / "single", tmp_path / "new")
    replace_model(tmp_path / "new", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (saved / "single").iterdir()} | {"train_log.jsonl", "checkpoint-1"}
    assert not list((tmp_path / "new").iterdir())
