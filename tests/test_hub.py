"""Pushed and loaded with the real client of the Hub, against a Hub on this machine."""

import json
import re
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

import pytest
import yaml
from hub_clients import READER, WRITER, run_clients
from hub_server import File, Hub, running_hub
from safetensors.torch import load
from small_runs import FOCUS, byte_tokenizer, texts, tiny_bert, tiny_llama
from tiny import randomize

from hf_focus import apply_focus

SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


def save_start(folder: Path) -> Path:
    """A small model with a branch that acts, and its tokenizer."""
    randomize(apply_focus(tiny_llama(), FOCUS)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def weights(names: set[str]) -> list[str]:
    return sorted(name for name in names if ".safetensors" in name or name.endswith(".bin"))


PUSHED = ("folder", "method", "saved", "stock", "trainer", "adapter")


def test_pushed_models_load_in_another_process_and_tell_nothing_of_this_one(hub: Hub, tmp_path: Path) -> None:
    save_start(tmp_path / "start")
    printed = run_clients(hub, tmp_path, WRITER, READER)
    loaded = dict(re.findall(r"^loaded (\S+) (\S+)$", printed, re.MULTILINE))
    assert set(loaded) == {"club/secret", *(f"me/{name}" for name in PUSHED)}
    assert loaded.pop("me/adapter") == "PeftModelForCausalLM"
    assert set(loaded.values()) == {"FocusLlamaForCausalLM"}
    check_shards(hub, json.loads((tmp_path / "files.json").read_text()))
    for names in ({path.name for path in (tmp_path / "saved").iterdir()}, hub.names("me/saved")):
        # Saved in one file first, and then in shards
        assert len(weights(names)) > 2
        assert "model.safetensors" not in names
    check_silence(hub, tmp_path)
    check_cards(hub)
    check_repositories(hub)


def check_shards(hub: Hub, pushes: list[list[str]]) -> None:
    """Fewer shards leave nothing behind, and every push is one commit."""
    counts = []
    for files in pushes:
        assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} <= set(files)
        held = weights(set(files))
        index = [name for name in held if name.endswith(".json")]
        shards = [name for name in held if name not in index]
        assert len(index) == (len(shards) > 1)
        assert all(name.endswith(f"-of-{len(shards):05}.safetensors") for name in shards if index)
        counts.append(len(shards))
    assert counts[0] == counts[3] > counts[1] > counts[2] == 1
    repo = hub.repos["me/method"]
    # One commit a push: no reader ever sees a part
    assert repo.messages[-4:] == [f"size {number}" for number in range(4)]
    tensors = {}
    for name, file in repo.files().items():
        if name.endswith(".safetensors"):
            tensors |= load(file.content)
    index = json.loads(repo.files()["model.safetensors.index.json"].content)
    assert set(index["weight_map"]) == set(tensors)


def check_silence(hub: Hub, folder: Path) -> None:
    """Nothing of this machine is pushed."""
    needles = [str(folder), str(Path.home()), f"/{getuser()}", "/tmp/", "token-of-me"]
    seen = 0
    for repo_id, repo in hub.repos.items():
        # What transformers' Trainer pickles holds its folders: the reason for ours
        for name, file in repo.files().items() if repo_id != "me/stock" else ():
            found = [needle for needle in needles if needle.encode() in file.content]
            assert not found, (repo_id, name, found)
            assert not re.search(r"\.(bin|pt|pth|pkl)$|checkpoint-|runs/|trackers/", name), (repo_id, name)
            seen += 1
    assert seen > 50
    assert "training_args.bin" in hub.names("me/stock")


def header(hub: Hub, repo_id: str) -> dict:
    text = hub.repos[repo_id].files()["README.md"].content.decode()
    return yaml.safe_load(text.split("---")[1])


def check_cards(hub: Hub) -> None:
    """Metadata of the cards."""
    for repo_id in ("me/folder", "me/method", "me/saved"):
        data = header(hub, repo_id)
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation"
        assert set(data["tags"]) == {"focusa", "hf_focus"}
        # It came from a folder of this machine
        assert "base_model" not in data
    data = header(hub, "me/trainer")
    assert data["license"] == "mit"
    assert data["language"] == ["en"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "loss"
    assert result["metrics"][0]["value"] > 0
    data = header(hub, "me/adapter")
    assert data["library_name"] == "peft"
    assert data["base_model"] == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-generation"


def check_repositories(hub: Hub) -> None:
    """Private or not, branches and commits."""
    assert hub.repos["club/secret"].private
    assert not hub.repos["me/folder"].private
    assert set(hub.repos["me/folder"].branches) == {"main", "other"}
    # Each save of the run was pushed, without the optimizer's state, and then the end
    assert hub.repos["me/trainer"].messages[1:] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]


FIRST = """
impatient()
push_folder("start", "me/interrupted")
model = transformers.AutoModelForCausalLM.from_pretrained("start")
torch.save(logits(model), "first.pt")
model.lm_head.weight.data.mul_(2)
model.save_pretrained("start", max_shard_size="150KB")
torch.save(logits(model), "second.pt")
before = HfApi().model_info("me/interrupted").sha
for pattern, times, status in [
    ("PUT /lfs", 99, None),
    ("PUT /lfs", 99, 500),
    ("PUT /lfs", 1, 400),
    ("POST .*/verify", 99, 503),
    ("POST .*/preupload", 99, 502),
    ("POST .*/commit/", 99, None),
    ("POST .*/commit/", 99, 503),
    ("POST /api/repos/create", 1, 500),
    ("GET .*/tree/", 99, 504),
]:
    fail(pattern, times, status)
    print(refused(lambda: push_folder("start", "me/interrupted")))
    heal()
    assert HfApi().model_info("me/interrupted").sha == before
"""

SECOND = """
# Passing failures: the client tries again
fail("PUT /lfs", 1)
fail("PUT /lfs", 2, 503)
fail("POST .*/preupload", 1, 500)
impatient()
print(push_folder("start", "me/interrupted").oid)
"""

LOADED = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/interrupted")
assert torch.equal(logits(model), torch.load(NAME))
"""


@pytest.mark.slow
def test_an_interrupted_push_leaves_what_was_there_and_a_second_completes(hub: Hub, tmp_path: Path) -> None:
    save_start(tmp_path / "start")
    printed = run_clients(hub, tmp_path, FIRST)
    assert len(re.findall("^FocusHubError", printed, re.MULTILINE)) == 9
    commits = len(hub.repos["me/interrupted"].commits)
    oid = run_clients(hub, tmp_path, LOADED.replace("NAME", '"first.pt"') + SECOND).strip()
    assert len(hub.repos["me/interrupted"].commits) == commits + 1
    assert hub.repos["me/interrupted"].branches["main"] == oid
    assert "model.safetensors" not in hub.names("me/interrupted")
    run_clients(hub, tmp_path, LOADED.replace("NAME", '"second.pt"'))


REFUSED = """
def push(repo_id, **options):
    return lambda: push_folder("start", repo_id, **options)

def pull(repo_id, **options):
    return lambda: pull_folder(repo_id, "pulled", **options)

print(refused(push("me/x", token=False), "token", "hf auth login"))
print(refused(push("me/x", token="token-of-nobody"), "token", "hf auth login"))
print(refused(push("me/x", token="token-to-read"), "repo_id", "write"))
print(refused(push("you/x"), "repo_id", "write"))
print(refused(push("you/theirs"), "repo_id", "write"))
print(refused(push("me/plain"), "repo_id", "bert", "overwrite"))
print(refused(push("me//x"), "repo_id", "owner/name"))
print(refused(push("me/a..b"), "repo_id", "owner/name"))
assert not HfApi().list_repo_files("you/theirs") == [], "read by anybody"
push("me/plain", overwrite=True)()
assert "pytorch_model.bin" not in HfApi().list_repo_files("me/plain")

# Others may propose what they may not write
proposed = push_folder("start", "me/whole-bert", create_pr=True, overwrite=True, token="token-of-you")
assert proposed.pr_revision == "refs/pr/1"
assert "README.md" not in HfApi().list_repo_files("me/whole-bert")
assert "README.md" in HfApi().list_repo_files("me/whole-bert", revision="refs/pr/1")

print(refused(pull("me/nothing"), "repo_id", "exists"))
print(refused(pull("you/secret"), "repo_id", "may see"))
print(refused(pull("me/whole", token=False, revision="nowhere"), "revision", "nowhere"))
print(refused(pull("me/whole-bert"), "model_type", "bert"))
print(refused(pull("me/truncated"), "model.safetensors", "whole safetensors file"))
print(refused(pull("me/tampered"), "model.safetensors"))
print(refused(pull("me/spoiled"), "hash"))
print(refused(pull("me/nonsense"), "config.json"))
print(refused(pull("me/other-config"), "config.json", "of another shape"))
fail("GET .*/resolve/.*model.safetensors", 99, None)
impatient()
print(refused(pull("me/whole"), "Hub", "me/whole"))
heal()
assert not [path for path in Path().iterdir() if "pulled" in path.name], "half-written"
fail("GET .*/resolve/.*model.safetensors", 1, None)
pull("me/whole")()
assert {path.name for path in Path("pulled").iterdir()} == set(HfApi().list_repo_files("me/whole"))
print(refused(pull("me/whole"), "pulled", "overwrite"))
os.environ["HF_HUB_OFFLINE"] = "1"
import huggingface_hub.constants as constants
constants.HF_HUB_OFFLINE = True
print(refused(push("me/x"), "HF_HUB_OFFLINE"))
"""


def test_bad_input_has_a_clear_error_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    save_start(tmp_path / "start")
    hub.users["token-to-read"] = "me"
    hub.readers.add("token-to-read")
    bert = tmp_path / "bert"
    tiny_bert().save_pretrained(bert)

    def put(repo_id: str, folder: Path, private: bool = False, **changes: bytes) -> None:
        from hub_server import Repo

        repo = hub.repos[repo_id] = Repo(private)
        files = {p.name: File(p.read_bytes(), p.suffix == ".safetensors") for p in folder.iterdir()}
        for name, content in changes.items():
            name = name.replace("__", ".")
            files[name] = File(content, name.endswith(".safetensors"))
        repo.commit("main", files, "start")

    start = tmp_path / "start"
    whole = (start / "model.safetensors").read_bytes()
    config = json.loads((start / "config.json").read_text())
    put("me/whole", start)
    put("you/theirs", start)
    put("you/secret", start, private=True)
    put("me/plain", bert, pytorch_model__bin=b"old")
    put("me/whole-bert", bert)
    put("me/truncated", start, model__safetensors=whole[:-50])
    put("me/tampered", start, model__safetensors=whole[:8] + b"}" + whole[9:])
    put("me/nonsense", start, config__json=json.dumps({**config, "num_attention_heads": "many"}).encode())
    put("me/other-config", start, config__json=json.dumps({**config, "intermediate_size": 64}).encode())
    put("me/spoiled", start)
    hub.spoiled.add("me/spoiled")
    theirs = hub.repos["you/theirs"].branches["main"]
    run_clients(hub, tmp_path, REFUSED)
    assert hub.repos["you/theirs"].branches["main"] == theirs
    assert not {"me/x", "you/x", "me/a..b"} & set(hub.repos)


FINETUNE = """
import runpy

def finetune(status, *flags):
    sys.argv = ["finetune.py", "run.yaml", *flags]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == status, stop.code

# Refused before anything is read or written
finetune(2, "--hub-model-id", "you/tuned")
finetune(2, "--hub-model-id", "tuned", "--no-focus")
assert not Path("out").exists()
finetune(0, "--hub-model-id", "tuned", "--hub-private")
"""

USAGE = """
card = Path(HfApi().hf_hub_download("me/tuned", "README.md")).read_text()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert type(model).__name__ == "FocusLlamaForCausalLM"
local = transformers.AutoModelForCausalLM.from_pretrained("out")
assert torch.equal(logits(model), logits(local))
"""


@pytest.mark.slow
def test_the_script_pushes(hub: Hub, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = {"model_name_or_path": "start", "train_files": ["rows.jsonl"], "eval_share": 0.3, "max_steps": 3}
    settings |= {"block_size": 16, "max_span": 8, "ramp": 3, "cpu": True, "cache_dir": "cache", "license": "mit"}
    settings |= {"push_to_hub": True, "report_to": ["tensorboard"], "save_steps": 2, "output_dir": "out"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))

    run_clients(hub, tmp_path, FINETUNE.replace("SCRIPT", repr(str(SCRIPT))))
    assert hub.repos["me/tuned"].private
    names = hub.names("me/tuned")
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "focus.png", "train_log.jsonl"}
    assert wanted <= names
    assert not [name for name in names if "/" in name or name == "run.json"]
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    card = hub.repos["me/tuned"].files()["README.md"].content.decode()
    for text in ("sparsity", "| `model.layers.1.self_attn` |", "](focus.png)", "bits per byte"):
        assert text in card
    assert str(tmp_path) not in card
    run_clients(hub, tmp_path, USAGE)
