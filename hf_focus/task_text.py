"""Tasks on running text: causal and masked language modelling."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset
from datasets import IterableDataset as DocumentStream
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from .arguments import DataArguments
from .collators import IGNORED, Batch, CausalCollator, MaskedCollator, SeparateCollator
from .data import find_text_column
from .errors import FocusConfigError, bad_value
from .packing import BlockShape, causal_shape, joined_blocks, masked_shape, pack, separate_blocks, tokenized
from .streaming import ExampleStream, stream_identity
from .task_types import (
    Encoded,
    Scores,
    Source,
    Task,
    count_labels,
    data_argument,
    encode_parts,
    numbered,
    score_labels,
    token_scores,
)


def _encode_blocks(make_shape: Callable[[PreTrainedTokenizerBase, int], BlockShape]) -> Callable[..., Encoded]:
    def encode(train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int) -> Encoded:
        shape = make_shape(source.tokenizer, size)
        separate = args.packing == "separate"

        def blocks(rows: Dataset, argument: str) -> Dataset:
            column = find_text_column(rows, args.text_column)
            return pack(rows, source.tokenizer, column, shape, argument, args.cache_dir, separate)

        if not isinstance(train, DocumentStream):
            return Encoded(*encode_parts(train, evaluation, args, blocks))

        def stream(
            documents: DocumentStream, argument: str, limit: int | None, shuffle_buffer: int = 0
        ) -> ExampleStream:
            column = find_text_column(documents, args.text_column)

            def make(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
                tokens = tokenized(batches, source.tokenizer, column)
                return separate_blocks(tokens, shape) if separate else joined_blocks(tokens, shape)

            return ExampleStream(documents, make, limit, shuffle_buffer, argument)

        if isinstance(evaluation, DocumentStream):
            evaluation = Dataset.from_list(list(stream(evaluation, "eval_split", args.max_eval_examples)))
        elif evaluation is not None:
            evaluation = numbered(blocks(evaluation, data_argument(args, False)))
        examples = stream(train, data_argument(args, True), args.max_train_examples, args.shuffle_buffer)
        # Before anything is changed, if there are none
        next(iter(examples))
        return Encoded(examples, evaluation, identity=stream_identity(train, args))

    return encode


def _causal_collator(source: Source, args: DataArguments) -> CausalCollator | SeparateCollator:
    return (SeparateCollator if args.packing == "separate" else CausalCollator)(source.tokenizer)


def _score_causal(outputs: Any, batch: Batch, source: Source) -> Scores:
    return token_scores(outputs.logits[:, :-1], batch["labels"][:, 1:], batch["num_bytes"])


def _masked_collator(source: Source, args: DataArguments) -> MaskedCollator:
    if source.tokenizer.mask_token_id is None:
        accepted = "one with a mask token, for masked-lm"
        raise FocusConfigError(bad_value("tokenizer", type(source.tokenizer).__name__, accepted))
    return MaskedCollator(source.tokenizer, mlm_probability=args.mlm_probability)


CAUSAL_LM = Task(
    name="causal-lm",
    auto_class=AutoModelForCausalLM,
    pipeline_tag="text-generation",
    encode=_encode_blocks(causal_shape),
    collator=_causal_collator,
    count_targets=lambda batch: int((batch["labels"][:, 1:] != IGNORED).sum()),
    score=_score_causal,
    reported=("loss", "perplexity", "bits_per_byte", "accuracy"),
    streams=True,
)
MASKED_LM = Task(
    name="masked-lm",
    auto_class=AutoModelForMaskedLM,
    pipeline_tag="fill-mask",
    encode=_encode_blocks(masked_shape),
    collator=_masked_collator,
    count_targets=count_labels,
    score=score_labels,
    reported=("loss", "perplexity", "accuracy"),
)
