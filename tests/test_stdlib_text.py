"""The corpus of the quickstart."""

import json
from pathlib import Path

import pytest

from hf_focus.errors import FocusDataError
from hf_focus.stdlib_text import is_held_out, stdlib_files, write_stdlib_corpus


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_parts_are_disjoint_and_large_enough(tmp_path: Path) -> None:
    sizes = {"one": 300_000, "two": 200_000, "eval": 50_000}
    files = write_stdlib_corpus(tmp_path, sizes)
    parts = {part: read(file) for part, file in files.items()}
    names = [row["file"] for rows in parts.values() for row in rows]
    assert len(names) == len(set(names))
    for part, rows in parts.items():
        assert sum(len(row["text"].encode()) for row in rows) >= sizes[part]
        assert all(is_held_out(row["file"]) == (part == "eval") for row in rows)


def test_the_same_every_time(tmp_path: Path) -> None:
    files = [write_stdlib_corpus(tmp_path / name, {"eval": 20_000})["eval"] for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_library_that_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "module.py").write_text("x = 1\n")
    (tmp_path / "library" / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "library" / "empty.py").write_text("\n")
    assert list(stdlib_files(tmp_path / "library")) == [("module.py", "x = 1\n")]
    with pytest.raises(FocusDataError, match="`sizes` got 100; accepted: at most 6 bytes for 'train'"):
        write_stdlib_corpus(tmp_path / "out", {"train": 100}, tmp_path / "library")
