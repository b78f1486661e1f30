"""Tasks on running text: causal and masked language modelling."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from .arguments import DataArguments
from .collators import IGNORED, Batch, CausalCollator, MaskedCollator
from .data import find_text_column
from .errors import FocusConfigError, bad_value
from .packing import BlockShape, causal_shape, masked_shape, pack
from .task_types import Encoded, Scores, Source, Task, count_labels, encode_parts, score_labels, token_scores


def _encode_blocks(make_shape: Callable[[PreTrainedTokenizerBase, int], BlockShape]) -> Callable[..., Encoded]:
    def encode(train: Dataset, evaluation: Dataset | None, source: Source, args: DataArguments, size: int) -> Encoded:
        shape = make_shape(source.tokenizer, size)

        def blocks(rows: Dataset, argument: str) -> Dataset:
            column = find_text_column(rows, args.text_column)
            return pack(rows, source.tokenizer, column, shape, argument, args.cache_dir)

        return Encoded(*encode_parts(train, evaluation, args, blocks))

    return encode


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
    collator=lambda source, args: CausalCollator(source.tokenizer),
    count_targets=lambda batch: int((batch["labels"][:, 1:] != IGNORED).sum()),
    score=_score_causal,
    reported=("loss", "perplexity", "bits_per_byte", "accuracy"),
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
