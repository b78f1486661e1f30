"""Documents to token blocks of one length, with the number of UTF-8 bytes that each block predicts."""

import hashlib
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .errors import FocusConfigError, FocusDataError, bad_value

# Blocks that documents are still put into, with `separate`
OPEN_BLOCKS = 64


def hash_code(file: str) -> str:
    """A hash of a module's source, given its `__file__`, to pass to what `datasets` runs.

    `datasets` knows a function by its name: without this, what an older version prepared is taken from its cache.
    """
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@dataclass(frozen=True)
class BlockShape:
    """How blocks are laid out: `head`, then body, then `tail`, `size` tokens in all.

    Args:
        size: tokens in a block.
        boundary: token put after every document.
        head: tokens every block begins with; None: the token before the block's body, so that every token of the data
            but the first boundary is predicted exactly once.
        tail: tokens every block ends with.
    """

    size: int
    boundary: int
    head: tuple[int, ...] | None = None
    tail: tuple[int, ...] = ()

    @property
    def body_size(self) -> int:
        """Tokens of the data in a full block."""
        return self.size - (1 if self.head is None else len(self.head)) - len(self.tail)


def causal_shape(tokenizer: PreTrainedTokenizerBase, size: int) -> BlockShape:
    """Blocks for causal LM: from the tokenizer's BOS token where it puts one, else from the token before."""
    boundary = _boundary(tokenizer)
    bos = tokenizer.bos_token_id
    # Whether it is used, not whether it is defined: GPT-2 defines one and was never trained on it
    uses_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return _check(BlockShape(size, boundary, (bos,) if uses_bos else None))


def masked_shape(tokenizer: PreTrainedTokenizerBase, size: int) -> BlockShape:
    """Blocks for masked LM: between the tokenizer's CLS and SEP tokens, where it has them."""
    head = () if tokenizer.cls_token_id is None else (tokenizer.cls_token_id,)
    tail = () if tokenizer.sep_token_id is None else (tokenizer.sep_token_id,)
    return _check(BlockShape(size, _boundary(tokenizer), head, tail))


def _boundary(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise FocusConfigError(bad_value("tokenizer", type(tokenizer).__name__, "one with an EOS, SEP or BOS token"))


def _check(shape: BlockShape) -> BlockShape:
    if shape.body_size < 1:
        special = shape.size - shape.body_size
        raise FocusConfigError(
            bad_value("block_size", shape.size, f"more than the {special} special tokens of a block")
        )
    return shape


def pack(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    shape: BlockShape,
    argument: str = "train_files",
    cache_dir: str | None = None,
    separate: bool = False,
) -> Dataset:
    """Documents joined and cut into blocks; blank documents are left out, the last block may be shorter.

    Args:
        rows: one document a row.
        column: of the text.
        argument: the argument the rows came from, for messages.
        cache_dir: where `datasets` keeps the blocks; None: its default.
        separate: keep documents apart, see `separate_blocks`.

    Returns:
        rows with `input_ids` (up to `shape.size`, int32) and `num_bytes`, UTF-8 bytes of the text in the block's body;
        with `separate` also `lengths`, the tokens of each document in the block.

    Raises:
        FocusDataError: nothing but blank documents.
    """
    tokens = rows.map(
        _tokenize,
        batched=True,
        remove_columns=rows.column_names,
        # Without them, a batch of blank documents would have no columns
        features=Features({"input_ids": List(Value("int32")), "token_bytes": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer, "column": column, "code": hash_code(__file__)},
        desc="Tokenizing",
    )
    if not any(len(ids) for batch in tokens.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]):
        raise FocusDataError(bad_value(argument, f"{len(rows)} documents without text", "documents that hold text"))
    features = {"input_ids": List(Value("int32")), "num_bytes": Value("int64")}
    if separate:
        features["lengths"] = List(Value("int32"))
    return Dataset.from_generator(
        separate_blocks if separate else joined_blocks,
        features=Features(features),
        gen_kwargs={"tokens": tokens, "shape": shape, "code": hash_code(__file__)},
        cache_dir=cache_dir,
    )


def tokenized(
    batches: Iterable[dict[str, list[Any]]], tokenizer: PreTrainedTokenizerBase, column: str
) -> Iterator[dict[str, list[int]]]:
    """Documents of a stream as `joined_blocks` and `separate_blocks` take them."""
    for batch in batches:
        tokens = _tokenize(batch, tokenizer, column)
        for ids, sizes in zip(tokens["input_ids"], tokens["token_bytes"], strict=True):
            yield {"input_ids": ids, "token_bytes": sizes}


def _tokenize(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, code: str = ""
) -> dict[str, list[Any]]:
    texts = [text for text in batch[column] if text and text.strip()]
    if not texts:
        return {"input_ids": [], "token_bytes": []}
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(ids)
    return {
        "input_ids": ids,
        "token_bytes": [count_bytes(text, len(i), o) for text, i, o in zip(texts, ids, offsets, strict=True)],
    }


def count_bytes(text: str, num_tokens: int, offsets: list[tuple[int, int]] | None = None) -> list[int]:
    """UTF-8 bytes of each token of `text`; they add up to the bytes of the text, if there is any token.

    What lies between two tokens (dropped whitespace) counts with the later one, what follows the last with the last.

    Args:
        text: the whole text.
        num_tokens: tokens it was cut into.
        offsets: start and end of each token, in characters; None: not known, the bytes are spread evenly.
    """
    if num_tokens == 0:
        return []
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(lengths)])
    if offsets is None:
        ends = before[-1] * np.arange(1, num_tokens + 1) // num_tokens
    else:
        # Of tokens that share a character the first counts it; some tokens have no place in the text: (0, 0)
        ends = np.maximum.accumulate(before[np.asarray(offsets)[:, 1]])
        ends[-1] = before[-1]
    return np.diff(ends, prepend=0).tolist()


def joined_blocks(
    tokens: Iterable[dict[str, list[int]]], shape: BlockShape, code: str = ""
) -> Iterator[dict[str, Any]]:
    """Documents one after the other, cut into blocks: a token may attend to the document before its own."""
    before = shape.boundary
    body: list[int] = []
    sizes: list[int] = []

    def block(start: int) -> dict[str, Any]:
        part = slice(start, start + shape.body_size)
        head = (before,) if shape.head is None else shape.head
        return {"input_ids": [*head, *body[part], *shape.tail], "num_bytes": sum(sizes[part])}

    for row in tokens:
        if not row["input_ids"]:
            continue
        body += [*row["input_ids"], shape.boundary]
        sizes += [*row["token_bytes"], 0]
        start = 0
        while len(body) - start >= shape.body_size:
            yield block(start)
            start += shape.body_size
            before = body[start - 1]
        body, sizes = body[start:], sizes[start:]
    if body:
        yield block(0)


def separate_blocks(
    tokens: Iterable[dict[str, list[int]]], shape: BlockShape, code: str = ""
) -> Iterator[dict[str, Any]]:
    """Whole documents, several in a block, as many as fit; longer ones are cut as `joined_blocks` cuts them.

    A document goes to the fullest of `OPEN_BLOCKS` begun blocks that has room for it.
    """
    # Fullest first
    begun: list[dict[str, Any]] = []
    for row in tokens:
        for piece in joined_blocks([row], shape):
            length = len(piece["input_ids"])
            room = shape.size - length
            place = next((i for i, block in enumerate(begun) if len(block["input_ids"]) <= room), None)
            block = {"input_ids": [], "num_bytes": 0, "lengths": []} if place is None else begun.pop(place)
            block["input_ids"] += piece["input_ids"]
            block["num_bytes"] += piece["num_bytes"]
            block["lengths"].append(length)
            insort(begun, block, key=lambda block: -len(block["input_ids"]))
            if len(begun[0]["input_ids"]) == shape.size or len(begun) > OPEN_BLOCKS:
                yield begun.pop(0)
    yield from begun
