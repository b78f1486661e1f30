"""Tokenizers, models and fine-tuning runs small enough for a test."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_focus import FocusConfig
from hf_focus.arguments import DataArguments, ModelArguments, TrainArguments
from hf_focus.task_types import Source
from hf_focus.training import FinetuneResult, finetune

SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "unk_token": "<unk>",
}
VOCABULARY = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FOCUS = FocusConfig(max_span=8, ramp=3, max_iterations=2, refiner=True)
SENTENCE = "the quick brown fox jumps over a lazy dog while grüne Vögel sing 汉字 in the rain"
WORDS = SENTENCE.split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate(VOCABULARY)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words without the space between them, and a BOS token in front, as BERT-like tokenizers do."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), "<bos>", *map(str.lower, WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 6)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", **SPECIAL)


def task_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, between CLS and SEP tokens as BERT-like tokenizers put them."""
    tokenizer = byte_tokenizer()
    names = {name: VOCABULARY.index(name) for name in ("<cls>", "<sep>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=list(names.items())
    )
    return tokenizer


def source(tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> Source:
    """What a task encodes for, with the config of a tiny BERT."""
    return Source(BertConfig(**SIZES, **settings), tokenizer or byte_tokenizer())


def tiny_llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "eos_token_id": 1, **changes}))


def tiny_bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES))


def tiny_llama_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=2))


def tiny_bert_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=2))


def texts(count: int) -> list[str]:
    """`count` different short texts."""
    return [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(4 + i % 5)) for i in range(count)]


def write_data(folder: Path) -> dict[str, list[str]]:
    """Nine documents to train on, three to evaluate on; every third one carries the other label."""
    names = {}
    for split, count in (("train", 9), ("eval", 3)):
        path = folder / f"{split}.jsonl"
        rows = [{"text": text, "label": "ba"[i % 3 == 0]} for i, text in enumerate(texts(count))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        names[f"{split}_files"] = [str(path)]
    return names


def folder(tmp_path: Path, name: str) -> Path:
    """A new folder."""
    path = tmp_path / name
    path.mkdir()
    return path


def run(
    folder: Path,
    data: dict[str, Any],
    model: PreTrainedModel | None = None,
    focus: FocusConfig | None = FOCUS,
    model_args: dict[str, Any] | None = None,
    data_args: dict[str, Any] | None = None,
    **train_args: Any,
) -> FinetuneResult:
    """`finetune` with small settings; `data` names the files, `focus=None` trains the plain model."""
    return finetune(
        ModelArguments(**{"focus": focus is not None, **(model_args or {})}),
        DataArguments(**{"block_size": 16, "cache_dir": str(folder / "cache"), **data, **(data_args or {})}),
        TrainArguments(
            **{
                "output_dir": str(folder / "out"),
                "max_steps": 4,
                "batch_size": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "progress_bar": False,
                "cpu": True,
                **train_args,
            }
        ),
        focus,
        model=model,
        tokenizer=None if model is None else byte_tokenizer(),
    )


def losses(result: FinetuneResult) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in result.log if "loss" in line}
