"""Corrupt lines of data: named, or left out."""

from pathlib import Path

import pytest

from hf_focus.arguments import DataArguments
from hf_focus.data import load_documents
from hf_focus.errors import FocusDataError

BAD = {
    "cut off": b'{"text": "fi',
    "a number": b"5",
    "something else": b"<html>",
}


def write(path: Path, bad: bytes) -> DataArguments:
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + bad + b'\n{"text": "three"}\n')
    return DataArguments(train_files=[str(path)], cache_dir=str(path.parent / "cache"), eval_share=0.0)


@pytest.mark.parametrize("kind", BAD)
def test_a_corrupt_line_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    args = write(tmp_path / "data.jsonl", BAD[kind])
    with pytest.raises(FocusDataError, match=r"train_files.*data\.jsonl:4 .*bad_lines"):
        load_documents(args)
    args.bad_lines = "skip"
    assert load_documents(args)[0]["text"][:] == ["one", "two", "three"]


@pytest.mark.parametrize("kind", BAD)
def test_a_corrupt_line_of_a_stream_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    args = write(tmp_path / "data.jsonl", BAD[kind])
    args.streaming = True
    rows = iter(load_documents(args)[0])
    assert [next(rows)["text"] for _ in range(2)] == ["one", "two"]
    with pytest.raises(FocusDataError, match=r"train_files.*data\.jsonl:4 .*bad_lines"):
        next(rows)
    args.bad_lines = "skip"
    for _ in range(2):
        assert [row["text"] for row in load_documents(args)[0]] == ["one", "two", "three"]


def test_what_was_skipped_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    args = write(tmp_path / "data.jsonl", BAD["cut off"])
    args.bad_lines = "skip"
    assert len(load_documents(args)[0]) == 3
    write(tmp_path / "data.jsonl", BAD["cut off"] + b'\n{"text": "four"}')
    assert len(load_documents(args)[0]) == 4


def test_an_array_beside_corrupt_lines_is_kept(tmp_path: Path) -> None:
    args = write(tmp_path / "data.jsonl", BAD["cut off"])
    array = tmp_path / "more.json"
    array.write_text('[\n{"text": "four"},\n{"text": "five"}\n]')
    args.train_files.append(str(array))
    with pytest.raises(FocusDataError, match=r"train_files.*data\.jsonl:4 .*bad_lines"):
        load_documents(args)
    args.bad_lines = "skip"
    assert load_documents(args)[0]["text"][:] == ["one", "two", "three", "four", "five"]
    for content, message in (('[{"text": 5}]', "columns"), ("[", "well-formed")):
        array.write_text(content)
        with pytest.raises(FocusDataError, match=rf"train_files.*more\.json.*{message}"):
            load_documents(args)
