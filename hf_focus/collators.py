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
