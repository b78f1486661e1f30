"""Tasks of encoder-decoders: text to text, and speech to text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset, Features, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .arguments import DataArguments
from .checkpoints import digest
from .collators import IGNORED, Batch
from .data import find_text_column
from .errors import FocusConfigError, FocusDataError, bad_value
from .task_types import (
    ACCURACY,
    PERPLEXITY,
    Encoded,
    Scores,
    Source,
    Task,
    check_column,
    count_labels,
    encode_parts,
    encode_rows,
    score_labels,
)

logger = logging.get_logger(__name__)


def _check_encoder_decoder(source: Source, task: str) -> None:
    if not source.config.is_encoder_decoder:
        accepted = f"an encoder-decoder for {task}, such as T5, BART or Whisper"
        raise FocusConfigError(bad_value("model", source.config.model_type, accepted))


def _labels_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[list[int]]:
    """Tokens of targets, each with an end: a decoder that never sees one never stops."""
    end = tokenizer.eos_token_id
    labels = tokenizer(text_target=texts, truncation=True, max_length=size, verbose=False)["input_ids"]
    return [ids if end is None or ids[-1:] == [end] else [*ids[: size - 1], end] for ids in labels]


def _encode_pairs(
    train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int
) -> Encoded:
    _check_encoder_decoder(source, "seq2seq")

    def examples(rows: Dataset, argument: str) -> Dataset:
        # As in {"translation": {"en": ..., "de": ...}}
        rows = rows.flatten() if "." in args.source_column + args.target_column else rows
        names = [find_text_column(rows, getattr(args, name), name) for name in ("source_column", "target_column")]
        encoded = encode_rows(
            rows,
            _tokenize_pairs,
            source,
            size,
            columns=names,
            prefix=args.source_prefix,
        )
        if len(encoded) == 0:
            raise FocusDataError(bad_value(argument, f"{len(rows)} pairs with a blank side", "pairs of texts"))
        return encoded

    return Encoded(*encode_parts(train, evaluation, args, examples))


def _tokenize_pairs(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    prefix: str,
    size: int,
    code: str,
) -> dict[str, list[Any]]:
    pairs = [
        pair for pair in zip(*(batch[name] for name in columns), strict=True) if all(t and t.strip() for t in pair)
    ]
    if not pairs:
        return {"input_ids": [], "attention_mask": [], "labels": []}
    texts = [prefix + text for text, _ in pairs]
    encoded = tokenizer(texts, truncation=True, max_length=size, return_token_type_ids=False, verbose=False)
    return {**encoded, "labels": _labels_of([target for _, target in pairs], tokenizer, size)}


def _encode_speech(
    train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int
) -> Encoded:
    _check_encoder_decoder(source, "speech-recognition")
    longest = getattr(source.features, "n_samples", None)

    def examples(rows: Dataset, argument: str) -> Dataset:
        text = find_text_column(rows, args.text_column)
        rows = _with_rate(rows, check_column(rows, "audio_column", args.audio_column), source.features.sampling_rate)
        encoded = encode_rows(
            rows,
            _read_speech,
            source,
            size,
            options={
                "batched": False,
                "features": Features({"samples": List(Value("float32")), "labels": List(Value("int64"))}),
                # A row may hold megabytes
                "writer_batch_size": 32,
                "desc": "Reading audio",
            },
            columns=[args.audio_column, text],
            rate=source.features.sampling_rate,
            argument=argument,
        )
        kept = [i for i, length in enumerate(_lengths(encoded)) if length and (longest is None or length <= longest)]
        if len(kept) < len(encoded):
            shown = f"{len(encoded) - len(kept)} of {len(encoded)} recordings"
            if not kept:
                accepted = f"recordings of at most {longest} samples, not empty"
                raise FocusDataError(bad_value(argument, shown, accepted))
            logger.warning(f"{shown} are empty or longer than the model's {longest} samples, and are left out.")
        return encoded.select(kept)

    parts = encode_parts(train, evaluation, args, examples)
    lengths = Dataset.from_dict({"samples": _lengths(parts[0]), "labels": parts[0]["labels"]})
    return Encoded(*parts, identity=digest(lengths))


def _lengths(rows: Dataset) -> list[int]:
    table = rows.with_format("arrow").select_columns("samples")
    return [
        length for part in table.iter(32) for length in part["samples"].combine_chunks().value_lengths().to_pylist()
    ]


def _with_rate(rows: Dataset, column: str, rate: int) -> Dataset:
    """Recordings are resampled to what the model hears, where `datasets` decodes them."""
    kind = rows.features[column]
    if isinstance(kind, Audio):
        return rows.cast_column(column, Audio(sampling_rate=rate))
    if isinstance(kind, List) or (isinstance(kind, dict) and {"array", "sampling_rate"} <= set(kind)):
        return rows
    accepted = "a column of `datasets.Audio`, of {'array', 'sampling_rate'}, or of lists of samples"
    raise FocusDataError(bad_value("audio_column", column, accepted))


def _read_speech(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    rate: int,
    size: int,
    argument: str,
    code: str,
) -> dict[str, Any]:
    audio, text = (row[name] for name in columns)
    if not isinstance(audio, list):
        if audio["sampling_rate"] != rate:
            accepted = f"{rate} a second, as the model hears; a column of `datasets.Audio` is resampled"
            raise FocusDataError(bad_value(argument, f"{audio['sampling_rate']} samples a second", accepted))
        audio = audio["array"]
    return {"samples": np.asarray(audio, dtype=np.float32), "labels": _labels_of([text or ""], tokenizer, size)[0]}


@dataclass
class _SpeechCollator:
    """Features of recordings, made when they are needed: they are larger than the samples."""

    source: Source

    def __call__(self, examples: list[Batch]) -> Batch:
        features, config = self.source.features, self.source.config
        fixed = hasattr(features, "n_samples")
        batch = features(
            [np.asarray(example["samples"], dtype=np.float32) for example in examples],
            sampling_rate=features.sampling_rate,
            padding="max_length" if fixed else "longest",
            # A model of fixed length reads the mask only to hide parts of the speech from itself
            return_attention_mask=not fixed or bool(getattr(config, "apply_spec_augment", False)),
            return_tensors="pt",
        )
        labels = [torch.tensor(example["labels"]) for example in examples]
        # The model puts it in front of what it decodes
        start = config.decoder_start_token_id
        labels = [row[1:] if row[0] == start and len(row) > 1 else row for row in labels]
        return {**batch, "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)}


def _transcribe(model: PreTrainedModel, batch: Batch, source: Source) -> Scores:
    """What the model writes by itself, at most as long as its decoder is."""
    inputs = {name: batch[name] for name in ("input_features", "attention_mask") if name in batch}
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_length=_decoder_limit(source))
    labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, source.tokenizer.pad_token_id)
    return {
        "heard": source.tokenizer.batch_decode(ids, skip_special_tokens=True),
        "spoken": source.tokenizer.batch_decode(labels, skip_special_tokens=True),
    }


def _decoder_limit(source: Source) -> int:
    return getattr(source.config, "max_target_positions", None) or source.tokenizer.model_max_length


SEQ2SEQ = Task(
    name="seq2seq",
    auto_class=AutoModelForSeq2SeqLM,
    # The Hub knows no other for models that are not of one use, such as translation
    pipeline_tag="text-generation",
    encode=_encode_pairs,
    collator=lambda source, args: DataCollatorForSeq2Seq(source.tokenizer, label_pad_token_id=IGNORED),
    count_targets=count_labels,
    score=score_labels,
    reported=("loss", "perplexity", "accuracy"),
    # The decoder's input is made from the labels
    targets=(),
    by_character=False,
)
SPEECH_RECOGNITION = Task(
    name="speech-recognition",
    auto_class=AutoModelForSpeechSeq2Seq,
    pipeline_tag="automatic-speech-recognition",
    encode=_encode_speech,
    collator=lambda source, args: _SpeechCollator(source),
    count_targets=count_labels,
    score=score_labels,
    generate=_transcribe,
    reported=("loss", "perplexity", "accuracy", "wer"),
    metrics={
        "perplexity": PERPLEXITY,
        "accuracy": ACCURACY,
        "wer": {"predictions": "heard", "references": "spoken"},
    },
    targets=(),
    needs_features=True,
    by_character=False,
)
