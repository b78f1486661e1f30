"""A saved Focus model carries its own code: processes without hf_focus load it with `trust_remote_code=True`."""

import json
from pathlib import Path

import pytest
import torch
from bare import Bare
from tiny import SETTINGS, TINY, logits, make_inputs, patched

import hf_focus
from hf_focus import FocusConfig
from hf_focus.errors import FocusCheckpointError

LIBRARY = Path(hf_focus.__file__).parent
# What only patching, training and looking need must not travel with every model
NOT_NEEDED = {f"{name}.py" for name in ("patching", "registration", "layer", "recording", "training", "cards", "data")}
# A process in which hf_focus cannot be imported
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_focus":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
try:
    import hf_focus
    raise SystemExit("hf_focus can be imported")
except ModuleNotFoundError:
    pass
"""
LOAD_ALL = """
for folder in sys.argv[1:]:
    auto, inputs, logits = torch.load(folder + "/expected.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits), folder
    print(type(model).__name__)
"""
TRAIN_SAVE_AGAIN = """
folder, again = sys.argv[1:]
auto, inputs, logits = torch.load(folder + "/expected.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(3):
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval().save_pretrained(again)
assert model.model.layers[0].self_attn.focus.refiner.num_updates.item() == 3
other = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, logits)
# Another head on the same body, and a pipeline
head = transformers.AutoModelForSequenceClassification.from_pretrained(again, trust_remote_code=True)
assert type(head).__name__ == "FocusLlamaForSequenceClassification"
assert torch.equal(head.model.layers[1].self_attn.focus.join, model.model.layers[1].self_attn.focus.join)
pipe = transformers.pipeline("text-generation", model=again, trust_remote_code=True)
assert type(pipe.model).__name__ == "FocusLlamaForCausalLM"
print("again")
"""
NOT_TRUSTED = """
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def save(name: str, folder: Path, **settings: float) -> Path:
    model, inputs = patched(name, FocusConfig.build(SETTINGS, **settings)), make_inputs(name)
    model.save_pretrained(folder)
    torch.save((type(model)._auto_class, inputs, logits(model, **inputs)), folder / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "names", [("llama", "bert", "whisper"), pytest.param(tuple(TINY), marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_architectures_load_without_hf_focus(names: tuple[str, ...], tmp_path: Path, bare: Bare) -> None:
    folders = [save(name, tmp_path / name) for name in names]
    folders.append(save("llama", tmp_path / "rotating_less", global_rotation=0.5))
    done = bare.run(WITHOUT + LOAD_ALL, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == len(folders)
    assert all(name.startswith("Focus") for name in done.stdout.split())


def test_towers_and_attention_off_the_interface_load_without_hf_focus(tmp_path: Path, bare: Bare) -> None:
    from test_base_features import focused, gptj, llava, picture_and_text

    cases = (
        (gptj(), "AutoModelForCausalLM", make_inputs("llama")),
        (llava(), "AutoModelForMultimodalLM", picture_and_text()),
    )
    folders = []
    for model, auto, inputs in cases:
        folder = tmp_path / auto
        focused(model).save_pretrained(folder)
        torch.save((auto, inputs, logits(model, **inputs)), folder / "expected.pt")
        folders.append(folder)
    done = bare.run(WITHOUT + LOAD_ALL, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["FocusGPTJForCausalLM", "FocusLlavaForConditionalGeneration"]


def test_trained_and_saved_again_without_hf_focus(llama: Path, tmp_path: Path, bare: Bare) -> None:
    from test_registration import word_tokenizer

    (tmp_path / "again").mkdir()
    word_tokenizer().save_pretrained(tmp_path / "again")
    done = bare.run(WITHOUT + TRAIN_SAVE_AGAIN, llama, tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = hf_focus.focus_model_class(type(TINY["llama"].build())).from_pretrained(tmp_path / "again")
    assert loaded.model.layers[0].self_attn.focus.refiner.num_updates.item() == 3


def test_code_must_be_trusted(llama: Path, bare: Bare) -> None:
    done = bare.run(WITHOUT + NOT_TRUSTED, llama)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_the_code_is_the_librarys_own_and_no_more(llama: Path) -> None:
    files = {file.name for file in llama.glob("*.py")}
    assert {"modeling.py", "focus_configs.py", "branch.py"} <= files
    assert not files & NOT_NEEDED
    assert all((llama / name).read_text() == (LIBRARY / name).read_text() for name in files)


def test_the_map_names_every_task(llama: Path) -> None:
    auto_map = json.loads((llama / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "focus_configs.FocusLlamaConfig"
    assert auto_map["AutoModel"] == "modeling.FocusLlamaModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling.FocusLlamaForCausalLM"
    assert auto_map["AutoModelForTokenClassification"] == "modeling.FocusLlamaForTokenClassification"


def test_with_hf_focus_the_local_classes_are_used(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=trust)
        assert type(model).__module__ == "hf_focus.modeling"


@pytest.mark.parametrize("saved", [10**6, None, "1"])
def test_newer_checkpoint_meets_older_code(saved: object, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    patched("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "focus_format": saved}))
    with pytest.raises(FocusCheckpointError, match=f"`focus_format` got {saved!r}; accepted: a format up to"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("module", ["modeling", "focus_configs"])
def test_names_that_are_no_classes(module: str) -> None:
    import importlib

    for name in ("FocusNothing", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(importlib.import_module(f"hf_focus.{module}"), name)
