"""Data sets: files of every format, held-out shares, blocks and their bytes, batches that do not depend on history."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import WORDS, byte_tokenizer, source, texts, word_tokenizer

from hf_focus.arguments import DataArguments
from hf_focus.collators import ReproducibleCollator
from hf_focus.data import hold_out, load_documents, load_files
from hf_focus.errors import FocusConfigError, FocusDataError
from hf_focus.packing import causal_shape, count_bytes, masked_shape, pack
from hf_focus.tasks import TASKS, find_task

TEXTS = [*texts(7), 'a "quoted", comma; and ümläut']
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40), min_size=1, max_size=6)


def write(folder: Path, name: str, rows: list[str]) -> str:
    path = folder / name
    table = Dataset.from_dict({"text": rows})
    writers = {
        ".txt": lambda: path.write_text("\n".join(rows), encoding="utf-8"),
        ".json": lambda: path.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8"),
        ".jsonl": lambda: table.to_json(path),
        ".csv": lambda: table.to_csv(path),
        ".parquet": lambda: table.to_parquet(path),
    }
    writers[path.suffix]()
    return str(path)


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    name = write(tmp_path, f"data{ending}", TEXTS)
    args = DataArguments(train_files=[name], eval_files=[name], sample_by="line", cache_dir=str(tmp_path / "cache"))
    train, evaluation = load_documents(args)
    assert train["text"] == evaluation["text"] == TEXTS


def test_a_text_file_is_one_document_and_files_add_up(tmp_path: Path) -> None:
    names = [write(tmp_path, f"{i}.txt", TEXTS[i:]) for i in range(2)]
    rows = load_files(names, cache_dir=str(tmp_path / "cache"))
    assert rows["text"] == ["\n".join(TEXTS), "\n".join(TEXTS[1:])]


@pytest.mark.parametrize(
    ("name", "content", "accepted"),
    [
        ("missing.txt", None, "an existing file"),
        ("empty.txt", "", "not empty"),
        ("empty.jsonl", "", "not empty"),
        ("header.csv", "text,label\n", "at least one row"),
        ("broken.json", '[{"text": ', "well-formed json"),
        ("table.xlsx", "x", ".parquet"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, content: str | None, accepted: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    args = DataArguments(train_files=[str(tmp_path / name)], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FocusDataError) as caught:
        load_documents(args)
    assert "train_files" in str(caught.value)
    assert name in str(caught.value)
    assert accepted in str(caught.value)


def test_bad_evaluation_files_and_sources_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path, "good.jsonl", TEXTS)
    cache = str(tmp_path / "cache")
    bad = [
        DataArguments(),
        DataArguments(dataset="a", train_files=[good]),
        DataArguments(train_files=[good], eval_files=[str(tmp_path / "none.txt")], cache_dir=cache),
        DataArguments(train_files=[good, write(tmp_path, "other.csv", TEXTS)], cache_dir=cache),
        DataArguments(dataset=str(tmp_path / "no_such_folder"), cache_dir=cache),
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.jsonl").write_text('{"text": "a"}\n{"text": ')
    bad += [DataArguments(dataset=str(tmp_path / "folder"), cache_dir=cache, streaming=x) for x in (False, True)]
    words = ["dataset", "dataset", "eval_files", "one format", "dataset", "well-formed", "well-formed"]
    for args, word in zip(bad, words, strict=True):
        with pytest.raises(FocusDataError, match=word):
            load_documents(args)


def test_columns_are_found_or_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"a": ["x y"], "b": ["z"]})
    encode = find_task("causal-lm").encode
    assert len(encode(rows, None, source(), DataArguments(text_column="b"), 8).train) == 1
    for args in (DataArguments(), DataArguments(text_column="c")):
        with pytest.raises(FocusDataError, match="text_column"):
            encode(rows, None, source(), args, 8)


def test_blank_documents_alone_are_refused() -> None:
    rows = Dataset.from_dict({"text": [" ", "\n"]})
    with pytest.raises(FocusDataError, match="train_files"):
        pack(rows, byte_tokenizer(), "text", causal_shape(byte_tokenizer(), 8))


@QUICK
@given(count=st.integers(1, 60), share=st.floats(0.02, 0.6), seed=st.integers(0, 5))
def test_held_out_text_is_not_trained_on_and_none_is_lost(count: int, share: float, seed: int) -> None:
    documents = [f"{i}:" + "x" * 100 for i in range(count)]
    train, evaluation = hold_out(Dataset.from_dict({"text": documents}), share, seed)
    if int(count * share):
        assert len(evaluation) == int(count * share)
        assert sorted([*train["text"], *evaluation["text"]]) == sorted(documents)
    else:
        joined = [head + tail for head, tail in zip(train["text"], evaluation["text"], strict=True)]
        assert joined == documents
    assert sum(map(len, evaluation["text"])) > 0
    again = hold_out(Dataset.from_dict({"text": documents}), share, seed)[1]
    assert again["text"] == evaluation["text"]


@QUICK
@given(text=st.text(min_size=1, max_size=60))
def test_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    clean = text.encode("utf-8", "ignore").decode()
    for tokenizer in (byte_tokenizer(), word_tokenizer()):
        encoded = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)
        counts = count_bytes(clean, len(encoded["input_ids"]), encoded["offset_mapping"])
        assert sum(counts) == (len(clean.encode()) if counts else 0)
        assert all(count >= 0 for count in counts)
    assert sum(count_bytes(text, 3)) == size


def test_bytes_are_those_of_the_token_they_are_given_to() -> None:
    # "ü" has two bytes; the space counts with the word behind it; what follows the last word counts with it
    text = "Vögel sing, grüne  "
    offsets = [(0, 5), (6, 10), (10, 11), (12, 17)]
    assert count_bytes(text, 4, offsets) == [6, 5, 1, 9]
    # A token without a place in the text, and two that share a character
    assert count_bytes("aü", 4, [(0, 1), (0, 0), (1, 2), (1, 2)]) == [1, 0, 2, 0]


@QUICK
@given(documents=DOCUMENTS, size=st.integers(2, 12))
def test_blocks_hold_every_token_once(documents: list[str], size: int) -> None:
    tokenizer = byte_tokenizer()
    kept = [document for document in documents if document.strip()]
    rows = Dataset.from_dict({"text": documents})
    if not kept:
        with pytest.raises(FocusDataError):
            pack(rows, tokenizer, "text", causal_shape(tokenizer, size))
        return
    blocks = pack(rows, tokenizer, "text", causal_shape(tokenizer, size)).to_list()
    stream = [token for block in blocks for token in block["input_ids"][1:]]
    expected = [
        t for d in kept for t in [*tokenizer(d, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert stream == expected
    before = [tokenizer.eos_token_id, *expected]
    assert [block["input_ids"][0] for block in blocks] == before[:: size - 1][: len(blocks)]
    assert all(len(block["input_ids"]) == size for block in blocks[:-1])
    assert sum(block["num_bytes"] for block in blocks) == sum(len(document.encode()) for document in kept)


def test_blocks_begin_and_end_as_the_tokenizer_wants() -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    words = word_tokenizer()
    assert {b["input_ids"][0] for b in pack(rows, words, "text", causal_shape(words, 6))} == {words.bos_token_id}
    masked = pack(rows, words, "text", masked_shape(words, 6)).to_list()
    assert {(b["input_ids"][0], b["input_ids"][-1]) for b in masked} == {(words.cls_token_id, words.sep_token_id)}
    with pytest.raises(FocusConfigError, match="block_size"):
        masked_shape(words, 2)


@QUICK
@given(numbers=st.lists(st.integers(0, 20), min_size=1, max_size=5), history=st.integers(0, 3))
def test_masks_depend_on_the_examples_alone(numbers: list[int], history: int) -> None:
    task, tokenizer = find_task("masked-lm"), byte_tokenizer()

    def collator() -> ReproducibleCollator:
        args = DataArguments(mlm_probability=0.05)
        return ReproducibleCollator(task.collator(source(tokenizer), args), task.count_targets, seed=1)

    # 3: CLS, 4: SEP
    examples = [{"input_ids": [3, *range(10, 14 + n), 4], "num_bytes": 4, "example": n} for n in numbers]
    used = collator()
    for _ in range(history):
        torch.rand(7)
        used(examples[:1])
    one, two = used(examples), collator()(examples)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["labels"], two["labels"])
    chosen = one["labels"] != -100
    assert chosen.any(dim=1).all()
    assert one["num_targets"] == int(chosen.sum())
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)
    assert torch.equal(one["labels"][chosen], original[chosen])
    assert not torch.isin(original[chosen], torch.tensor(tokenizer.all_special_ids)).any()
    assert torch.equal(one["input_ids"][~chosen], original[~chosen])


def test_masks_change_with_the_epoch() -> None:
    task = find_task("masked-lm")
    collator = ReproducibleCollator(task.collator(source(), DataArguments()), task.count_targets)
    example = [{"input_ids": list(range(10, 60)), "num_bytes": 50, "example": 0}]
    first = collator(example)["labels"]
    collator.epoch = 1
    assert not torch.equal(first, collator(example)["labels"])


def test_padding_is_on_the_right_and_never_a_label() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    batch = find_task("causal-lm").collator(source(tokenizer), DataArguments())(
        [{"input_ids": [7, 8, 9], "num_bytes": 2}, {"input_ids": [7], "num_bytes": 0}]
    )
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [7, -100, -100]]


def test_labels_are_numbered_and_unknown_ones_refused() -> None:
    encode = find_task("sequence-classification").encode
    train = Dataset.from_dict({"text": WORDS[:4], "label": ["no", "yes", "no", "maybe"]})
    encoded = encode(train, train, source(), DataArguments(), 16)
    assert encoded.config["id2label"] == {0: "maybe", 1: "no", 2: "yes"}
    assert encoded.train["labels"] == [1, 2, 1, 0]
    other = Dataset.from_dict({"text": ["a"], "label": ["never seen"]})
    for rows, evaluation, args, word in [
        (train, other, DataArguments(eval_files=["x.csv"]), "eval_files"),
        (train, None, DataArguments(label_column="class"), "label_column"),
        (train.select([0, 2]), None, DataArguments(), "two labels"),
    ]:
        with pytest.raises(FocusDataError, match=word):
            encode(rows, evaluation, source(), args, 16)


def test_pairs_of_texts_are_joined_and_cut() -> None:
    rows = Dataset.from_dict({"one": ["abc", "d"], "two": ["efg", "h"], "label": [0, 1]})
    args = DataArguments(text_column="one", text_pair_column="two")
    encoded = find_task("sequence-classification").encode(rows, None, source(), args, 5)
    assert [len(ids) for ids in encoded.train["input_ids"]] == [5, 2]


def test_a_task_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(FocusConfigError, match=", ".join(TASKS)):
        find_task("translation")
