"""The page of what is covered, patches/COVERAGE.md, is true: it lists every type, and a sample of it is checked."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from coverage import PAGE, compare  # noqa: E402
from coverage_checks import check_model_type  # noqa: E402
from coverage_page import MARKS, PROPERTIES, page, read_page, works  # noqa: E402

from hf_focus import supported_architectures  # noqa: E402
from hf_focus.support import auto_model_types  # noqa: E402

VERSION, TABLE = read_page(PAGE.read_text(encoding="utf-8"))
# One of each kind: experts, latent attention, sinks, parallel blocks, recurrent layers beside attention, many towers,
# windows of images, sound, attention off the interface
SAMPLE = (
    "bloom",
    "clip",
    "cohere",
    "deberta-v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoehybrid",
    "hubert",
    "llava",
    "pegasus",
    "swin",
    "xlm",
)
this_version = pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the page is of transformers {VERSION}")


@this_version
def test_every_model_type_is_in_the_table() -> None:
    assert sorted(TABLE) == sorted(auto_model_types())


@this_version
@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_is_true(name: str) -> None:
    threads = torch.get_num_threads()
    report = check_model_type(name)
    torch.set_num_threads(threads)
    found = {key: MARKS[report.properties.get(key, "-: ")[:3]] for key in PROPERTIES}
    assert found == TABLE[name], report
    assert works(report.to_dict()), report


def test_most_types_work() -> None:
    """The least that is promised: 150 model types, among them every kind of decoder."""
    good = [
        marks for marks in TABLE.values() if marks and all(marks[key] == "✓" for key in ("whole", "removal", "saving"))
    ]
    assert len(good) >= 150
    assert "✗" not in {mark for marks in good for mark in marks.values()}
    assert sum(marks["cache"] == "✓" for marks in good) >= 100


@this_version
def test_what_is_said_to_be_supported_is_patched() -> None:
    patched = {name for name, marks in TABLE.items() if marks}
    assert patched <= set(supported_architectures())


def test_page_is_read_as_it_was_written() -> None:
    entry = {
        "model_type": "llama",
        "task": "MODEL",
        "model": "LlamaModel",
        "status": "checked",
        "reason": "",
        "heads": "4×8",
    }
    entry["properties"] = dict.fromkeys(PROPERTIES, "yes") | {"padding": "-: no decoder"}
    refused = {"model_type": "bit", "status": "refused", "reason": "no | attention", "properties": {}}
    version, table = read_page(page([entry, refused], "1.2"))
    assert version == "1.2"
    assert table == {"llama": dict.fromkeys(PROPERTIES, "✓") | {"padding": "–"}, "bit": {}}


def test_runs_are_compared() -> None:
    old = {"a": {"status": "checked", "properties": {"cache": "yes"}}, "gone": {"status": "refused", "properties": {}}}
    new = {"a": {"status": "failed", "properties": {"cache": "no: 1e-2"}}}
    lines = list(compare(old, new))
    assert lines == ["a: cache: yes -> no: 1e-2", "a: status: checked -> failed", "gone: only in the old run"]
