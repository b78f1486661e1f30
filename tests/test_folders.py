"""Folders of models: written whole or not at all, and loaded as the class that saved."""

import json
from pathlib import Path

import pytest
from small_runs import tiny_llama
from transformers import LlamaForSequenceClassification

from hf_focus.errors import FocusConfigError
from hf_focus.folders import copy_companions, load_model, write_text_beside, written_beside


def test_written_beside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_beside(out) as folder:
        assert folder.parent == out.parent, "a rename works within one file system"
        assert not out.exists()
        (folder / "config.json").write_text("1")
    assert (out / "config.json").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), written_beside(out, overwrite=True) as folder:
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "1"
    # Somebody else took the name meanwhile: theirs stays
    with pytest.raises(FocusConfigError, match="other"), written_beside(tmp_path / "other") as folder:
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_link_is_replaced_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with written_beside(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "1"


def test_write_text_beside(tmp_path: Path) -> None:
    write_text_beside(tmp_path / "new" / "page.html", "one")
    write_text_beside(tmp_path / "new" / "page.html", "two")
    with pytest.raises(UnicodeEncodeError):
        write_text_beside(tmp_path / "new" / "page.html", "\udc00")
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["two"]


def test_load_model_takes_the_class_that_saved(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path / "classifier")
    assert type(load_model(str(tmp_path / "classifier"))) is LlamaForSequenceClassification
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    (tmp_path / "classifier" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(FocusConfigError, match="auto-class"):
        load_model(str(tmp_path / "classifier"))


def test_what_lies_beside_the_weights_is_copied(tmp_path: Path) -> None:
    names = {"source.spm", "bpe.codes", "modules.json", "1_Pooling/config.json", "tokenizer.json"}
    for name in (*names, "pytorch_model.bin", "runs/events", "config.json"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "tokenizer.json").write_text("its own")
    assert set(copy_companions(str(tmp_path / "from"), tmp_path / "to")) == names - {"tokenizer.json"}
    assert (tmp_path / "to" / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
    assert (tmp_path / "to" / "tokenizer.json").read_text() == "its own"
