"""Batches for each task, made the same way whenever and wherever they are made."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

IGNORED = -100
Batch = dict[str, Any]


def stable_seed(*parts: int) -> int:
    """One seed from several numbers, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass
class CausalCollator:
    """Pads on the right; every token but padding is a label (the model shifts)."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[Batch]) -> Batch:
        # A batch padded on the left would make the model predict its first token from padding
        batch = self.tokenizer.pad(examples, padding_side="right", return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return dict(batch)


@dataclass
class SeparateCollator:
    """Rows that hold several documents: positions begin anew in each, which transformers reads as their borders.

    There is no attention mask, and no cache is made: with either, transformers does not look for borders. What is
    padded on the right counts as one more document.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[Batch]) -> Batch:
        size = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), size), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORED)
        positions = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example["input_ids"])
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
            lengths = [*example["lengths"], size - len(tokens)]
            positions[row] = torch.cat([torch.arange(length) for length in lengths])
        # The model shifts: the first token of a document would be predicted from the document before
        labels[positions == 0] = IGNORED
        num_bytes = torch.tensor([example["num_bytes"] for example in examples])
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": labels,
            "num_bytes": num_bytes,
            "use_cache": False,
        }


class MaskedCollator(DataCollatorForLanguageModeling):
    """transformers' masking (80% mask, 10% random, 10% kept), with at least one token to predict in an example."""

    def torch_mask_tokens(self, inputs: Any, special_tokens_mask: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        if special_tokens_mask is None:
            special = torch.isin(inputs, torch.tensor(self.tokenizer.all_special_ids))
        else:
            special = special_tokens_mask.bool()
        original = inputs.clone()
        inputs, labels = super().torch_mask_tokens(inputs, special_tokens_mask=special, **kwargs)
        lacking = (labels == IGNORED).all(dim=1) & ~special.all(dim=1)
        # The first true token, as argmax gives the first of equals
        place = (~special).int().argmax(dim=1)
        labels[lacking, place[lacking]] = original[lacking, place[lacking]]
        inputs[lacking, place[lacking]] = self.tokenizer.mask_token_id
        return inputs, labels


@dataclass
class ReproducibleCollator:
    """What a task's collator makes, plus `num_targets`, an int: what the loss of the batch is the mean of.

    Random choices depend on the seed, the epoch and the examples alone: not on how many batches came before, so that a
    resumed run sees the same masks.

    Args:
        inner: the task's collator.
        count: `num_targets` from the batch.
        seed: of the run.
        epoch: set it before an epoch begins.
    """

    inner: Callable[[list[Batch]], Batch]
    count: Callable[[Batch], int]
    seed: int = 0
    epoch: int = 0

    def __call__(self, examples: list[Batch]) -> Batch:
        numbers = [example["example"] for example in examples]
        examples = [{name: value for name, value in example.items() if name != "example"} for example in examples]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.seed, self.epoch, *numbers))
            batch = self.inner(examples)
        return {**batch, "num_targets": self.count(batch)}
