"""Streams and packed rows: the same examples in the same order for any number of processes; packed = separate."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import FOCUS, byte_tokenizer, losses, run, source, texts, tiny_bert, tiny_llama
from tiny import TINY, VOCAB, randomize

from hf_focus import apply_focus
from hf_focus.arguments import DataArguments
from hf_focus.batches import FIRST_PASS, Pass, endless_batches
from hf_focus.collators import ReproducibleCollator, SeparateCollator
from hf_focus.data import load_documents
from hf_focus.errors import FocusConfigError, FocusDataError
from hf_focus.packing import causal_shape, joined_blocks, separate_blocks
from hf_focus.preparation import check_packing
from hf_focus.tasks import find_task

DOCUMENTS = st.lists(st.text("abcde", min_size=1, max_size=30), min_size=1, max_size=20)


def as_tokens(documents: list[str]) -> list[dict[str, list[int]]]:
    tokenizer = byte_tokenizer()
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return [{"input_ids": row, "token_bytes": [1] * len(row)} for row in ids]


def write(path: Path, documents: list[str]) -> str:
    rows = Dataset.from_dict({"text": documents})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("\n".join(documents), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, size=st.integers(3, 20))
def test_packed_rows_hold_every_document_once_and_whole(documents: list[str], size: int) -> None:
    tokens, shape = as_tokens(documents), causal_shape(byte_tokenizer(), size)
    alone = [block["input_ids"] for row in tokens for block in joined_blocks([row], shape)]
    rows = list(separate_blocks(tokens, shape))
    packed = []
    for row in rows:
        assert sum(row["lengths"]) == len(row["input_ids"]) <= size
        ids = iter(row["input_ids"])
        packed += [list(islice(ids, length)) for length in row["lengths"]]
    assert sorted(packed) == sorted(alone)
    assert sum(row["num_bytes"] for row in rows) == sum(map(len, documents))
    # No two rows would fit into one
    shortest = sorted(len(row["input_ids"]) for row in rows)[:2]
    assert len(rows) < 2 or sum(shortest) > size


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_the_loss_of_packed_rows_is_that_of_the_documents(name: str) -> None:
    model = randomize(apply_focus(TINY[name].build(), FOCUS)).eval()
    check_packing(model)
    shape = causal_shape(byte_tokenizer(), 24)
    noise = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (9,), generator=noise).tolist()
    tokens = [
        {"input_ids": torch.randint(3, VOCAB, (n,), generator=noise).tolist(), "token_bytes": [1] * n} for n in lengths
    ]
    rows = list(separate_blocks(tokens, shape))
    assert max(len(row["lengths"]) for row in rows) > 1
    batch = SeparateCollator(byte_tokenizer())(rows)
    del batch["num_bytes"]
    packed = model(**batch).loss
    packed.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pieces = [torch.tensor([block["input_ids"]]) for row in tokens for block in joined_blocks([row], shape)]
    count = sum(piece.shape[1] - 1 for piece in pieces)
    separate = sum(model(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in pieces) / count
    separate.backward()
    assert packed.item() == pytest.approx(separate.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_model_that_mixes_packed_documents_is_refused(tmp_path: Path) -> None:
    data = {"train_files": [write(tmp_path / "a.jsonl", texts(6))]}
    model = TINY["opt"].build(vocab_size=300, eos_token_id=1)
    with pytest.raises(FocusConfigError, match="packing"):
        run(tmp_path, data, model, data_args={"packing": "separate"})
    assert type(model).__name__ == "OPTForCausalLM"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packing", ["joined", "separate"])
def test_a_stream_resumes_to_the_same_losses(tmp_path: Path, packing: str) -> None:
    data = {
        "train_files": [write(tmp_path / "a.jsonl", texts(12))],
        "eval_files": [write(tmp_path / "b.jsonl", texts(3))],
    }
    options = {"streaming": True, "shuffle_buffer": 5, "packing": packing, "block_size": 40}
    # Past the end of the data, so that a second epoch begins
    settings = {"data_args": options, "max_steps": 14, "save_steps": 5, "save_limit": None}
    (tmp_path / "one").mkdir()
    whole = run(tmp_path / "one", data, tiny_llama(), **settings)
    epochs = {line["step"]: line["epoch"] for line in whole.log if "loss" in line}
    assert epochs[14] >= 1
    assert whole.metrics["bits_per_byte"] > 0
    for step in (5, 10):
        (tmp_path / str(step)).mkdir()
        checkpoint = tmp_path / "one" / "out" / f"checkpoint-{step}"
        again = run(tmp_path / str(step), data, tiny_llama(), resume=str(checkpoint), **settings)
        assert losses(again) == {k: v for k, v in losses(whole).items() if k > step}


def collator() -> ReproducibleCollator:
    return ReproducibleCollator(lambda examples: {"ids": [tuple(e["input_ids"]) for e in examples]}, lambda batch: 1)


def test_processes_share_a_stream_without_overlap_and_in_order(tmp_path: Path) -> None:
    args = DataArguments(
        train_files=[write(tmp_path / "a.jsonl", texts(15))], streaming=True, eval_share=0.0, shuffle_buffer=7
    )
    stream = find_task("causal-lm").encode(*load_documents(args), source(), args, 12).train
    passes = [[tuple(example["input_ids"]) for example in stream.in_order(3, number)] for number in range(3)]
    assert len({*map(tuple, passes)}) == 3
    expected = [
        (ids, Pass(number, sum(map(len, passes[:number])))) for number, rows in enumerate(passes) for ids in rows
    ]

    def read(size: int, count: int, **begin: Any) -> list[tuple[tuple[int, ...], Pass]]:
        """Every row with the pass that its batch ends in, of `count` processes in turns, nearly three passes long."""
        first = begin.pop("first", 0)
        parts = [
            iter(endless_batches(stream, collator(), size, 3, first + rank, count, **begin)) for rank in range(count)
        ]
        batches = [next(part) for _ in range(len(expected) // (size * count) - first // count) for part in parts]
        return [(ids, batch["last_pass"]) for batch in batches for ids in batch["ids"]]

    for size, count in ((1, 1), (2, 3), (60, 1)):
        found = read(size, count)
        assert [ids for ids, _ in found] == [ids for ids, _ in expected[: len(found)]]
        # From a later place on, found from any pass that was read before it
        for turn in (1, len(expected) // (2 * size * count)):
            place = turn * size * count
            for begun in {FIRST_PASS, *(last for _, last in found[:place])}:
                assert read(size, count, first=turn * count, begun=begun) == found[place:]
    assert all(last == expected[number][1] for number, (_, last) in enumerate(read(1, 1)))
    assert read(3, 1, num_workers=1) == read(3, 1)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_a_stream_holds_what_the_files_hold(tmp_path: Path, ending: str) -> None:
    names = [write(tmp_path / f"{part}{ending}", texts(9)[part::2]) for part in (0, 1)]
    options = {"train_files": names, "eval_share": 0.0, "sample_by": "line", "cache_dir": str(tmp_path / "cache")}
    encode = find_task("causal-lm").encode
    found = []
    for streaming in (False, True):
        args = DataArguments(streaming=streaming, shuffle_buffer=0, **options)
        rows = encode(load_documents(args)[0], None, source(), args, 10).train
        found.append([example["input_ids"] for example in rows])
    assert found[0] == found[1]
    # Pass after pass
    for number in range(6):
        assert [example["input_ids"] for example in rows.in_order(0, number)] == found[0]


def test_a_data_set_by_name_is_streamed_with_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.jsonl", texts(8))
    write(folder / "validation.jsonl", texts(4))
    data = {"dataset": str(folder)}
    options = {"streaming": True, "max_eval_examples": 2}
    result = run(tmp_path, data, tiny_llama(), data_args=options, max_steps=2)
    assert result.metrics["perplexity"] > 1


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    data = {"train_files": [write(tmp_path / "a.jsonl", texts(4))]}
    blank = write(tmp_path / "blank.jsonl", ["", "  "])
    stream = {"streaming": True, "eval_share": 0.0}
    cases: list[tuple[dict[str, Any], dict[str, Any], type, str]] = [
        (stream, {"max_steps": None}, FocusConfigError, "max_steps"),
        (stream, {"num_workers": 2}, FocusConfigError, "num_workers"),
        ({"streaming": True}, {}, FocusDataError, "eval_share"),
        (stream, {"task": "masked-lm", "model": tiny_bert()}, FocusConfigError, "streaming"),
        ({"packing": "separate"}, {"task": "masked-lm", "model": tiny_bert()}, FocusConfigError, "packing"),
        ({**stream, "train_files": [blank]}, {}, FocusDataError, "train_files"),
    ]
    for number, (data_args, changes, error, word) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(error, match=word):
            run(place, data, **{"model": tiny_llama(), "data_args": data_args, **changes})
        assert not (place / "out").exists()


def test_a_batch_may_hold_more_than_one_pass(tmp_path: Path) -> None:
    data = {"train_files": [write(tmp_path / "a.jsonl", texts(4))]}
    result = run(
        tmp_path, data, tiny_llama(), data_args={"streaming": True, "eval_share": 0.0}, batch_size=50, max_steps=2
    )
    assert result.log[-1]["epoch"] > 2
