"""What the tests' clients of the Hub do: each runs in a process of its own, with caches of its own."""

import os
import subprocess
import sys
from pathlib import Path

from hub_server import Hub

# Imported by every client: the folder of the tests is on its path
PRELUDE = """
import json, os, re, shutil, sys, urllib.request
from pathlib import Path
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars
import hf_focus
from hf_focus.errors import FocusError, FocusHubError
from hf_focus.sharing import pull_folder, push_folder
transformers.utils.logging.disable_progress_bar()
disable_progress_bars()
IDS = torch.arange(10, 40)[None]

def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits

def fail(pattern, times, status=None, address="/fail"):
    body = json.dumps({"pattern": pattern, "times": times, "status": status}).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + address, body, method="POST"))

def heal():
    fail("", 0, address="/heal")

def impatient():
    # The client waits up to 23 s before it gives up
    import huggingface_hub.utils._http as http
    http.time.sleep = lambda seconds: None

def refused(call, *words):
    try:
        call()
    except FocusError as error:
        assert all(word in str(error) for word in words), (words, str(error))
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"accepted, and should have said {words}")
"""

# Each program in a process of its own, with empty caches; what all of them import is imported once
IN_TURN = """
for code in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(code)
        sys.exit()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(1)
    shutil.rmtree(os.environ["HF_HOME"])
    os.mkdir(os.environ["HF_HOME"])
"""

# Pushes models in every way there is; what they compute is kept for the reader
WRITER = """
from small_runs import FOCUS, byte_tokenizer, tiny_llama, texts
from datasets import Dataset
from peft import get_peft_model
from tiny import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments
from hf_focus.trainer import FocusTrainer

model = AutoModelForCausalLM.from_pretrained("start")
tokenizer = AutoTokenizer.from_pretrained("start")
expected = {}

def keep(name, model, **options):
    expected[name, options.get("revision")] = logits(model)

# A folder; a branch; a private repository; an organization's
push_folder("start", "folder")
keep("me/folder", model)
push_folder("start", "me/folder", revision="other")
keep("me/folder", model, revision="other")
push_folder("start", "club/secret", private=True)
keep("club/secret", model)

# The model's own methods, in shards; then again in fewer, in none, and in shards
tokenizer.push_to_hub("me/method")
files = []
for number, size in enumerate(("150KB", "500KB", "1GB", "150KB")):
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.push_to_hub("me/method", max_shard_size=size, commit_message=f"size {number}")
    files.append(sorted(HfApi().list_repo_files("me/method")))
Path("files.json").write_text(json.dumps(files))
keep("me/method", model)
model.save_pretrained("saved")
model.lm_head.weight.data.mul_(1.1)
tokenizer.save_pretrained("saved")
model.save_pretrained("saved", push_to_hub=True, repo_id="me/saved", max_shard_size="300KB")
keep("me/saved", model)

# Trainer, transformers' and ours
ids = [tokenizer(text, max_length=16, truncation=True)["input_ids"] for text in texts(6)]
rows = Dataset.from_dict({"input_ids": ids})
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
common = dict(push_to_hub=True, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="steps",
    save_steps=1, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2)
for name, trainer_class, strategy in (("stock", Trainer, "end"), ("trainer", FocusTrainer, "every_save")):
    settings = TrainingArguments(f"runs/{name}", hub_model_id=f"me/{name}", hub_strategy=strategy, **common)
    trainer = trainer_class(AutoModelForCausalLM.from_pretrained("start"), settings, train_dataset=rows,
        eval_dataset=rows, processing_class=tokenizer, data_collator=collate)
    trainer.train()
    trainer.push_to_hub(**({"license": "mit", "language": "en"} if name == "trainer" else {}))
    keep(f"me/{name}", trainer.model)

# An adapter, on a plain base that lies on the Hub
tiny_llama().push_to_hub("me/base")
tokenizer.push_to_hub("me/base")
base = AutoModelForCausalLM.from_pretrained("me/base")
adapted = get_peft_model(base, hf_focus.FocusAdapterConfig(focus_config=FOCUS.to_dict(), task_type="CAUSAL_LM"))
randomize(adapted)
adapted.save_pretrained("adapter")
push_folder("adapter", "me/adapter")
keep("me/adapter", adapted)
torch.save(expected, "expected.pt")
"""

# Runs the usage of every card as pasted, and compares
READER = """
from transformers import AutoModelForCausalLM, AutoTokenizer
for (name, revision), values in torch.load("expected.pt").items():
    card = Path(HfApi().hf_hub_download(name, "README.md", revision=revision)).read_text()
    if name == "me/stock":
        # That card is transformers', which has no usage
        snippet = f"model = AutoModelForCausalLM.from_pretrained('{name}')"
    else:
        snippet = re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1]
        if revision:
            load = "AutoModelForCausalLM.from_pretrained(name"
            snippet = snippet.replace(load, f"{load}, revision={revision!r}")
        assert f'"{name}"' in snippet
    names = dict(AutoModelForCausalLM=AutoModelForCausalLM)
    exec(snippet, names)
    assert any(".focus." in key for key in names["model"].state_dict()), name
    assert torch.equal(logits(names["model"]), values), name
    print("\\nloaded", name, type(names["model"]).__name__)
tokenizer = AutoTokenizer.from_pretrained("me/folder")
assert tokenizer.decode(tokenizer("grüne Vögel")["input_ids"]) == "grüne Vögel"
"""


def run_clients(hub: Hub, folder: Path, *codes: str, token: str | None = "token-of-me", timeout: int = 120) -> str:
    """Run programs after `PRELUDE` in `folder`, each in a new process with clean caches; their standard output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    cache = folder / f"home-{len(list(folder.glob('home-*')))}"
    cache.mkdir()
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")]),
        **({"HF_TOKEN": token} if token else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + IN_TURN, *codes],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
