"""Arguments of fine-tuning: dataclasses that become flags, or are read from a YAML or JSON file."""

import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from .argument_rules import Checked, documented, setting_texts
from .configuration import FocusConfig
from .errors import FocusConfigError, bad_value


@documented
@dataclass
class ModelArguments(Checked):
    """Which model is trained, and which of its weights.

    Args:
        model_name_or_path: model id on the Hub, or folder; may already carry FocusA.
        revision: branch, tag or commit of the model on the Hub.
        tokenizer: tokenizer id or folder. Default: the model's.
        trust_remote_code: run model code from the Hub.
        dtype: type of the weights.
        attn_implementation: attention of the model itself: sdpa or eager. Default: the model's.
        from_scratch: start from random weights: only the model's config is read.
        focus: patch the model with FocusA; --no-focus trains the plain model the same way.
        freeze_base: train FocusA alone (and a head that the checkpoint does not hold).
        lora_rank: rank of LoRA on the base's linear layers, merged at the end; 0: no LoRA.
        lora_alpha: scale of LoRA. Default: twice the rank.
        lora_dropout: dropout of LoRA.
        lora_targets: names of the modules that get LoRA. Default: all linear layers.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        license: licence id for the model card, for example apache-2.0. Take the base model's.
        language: language codes for the model card, for example en.

    Raises:
        FocusConfigError: a value of the wrong type or out of range.
    """

    # The heading under which `--help` lists them
    _argument_group_name = "Model"

    model_name_or_path: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    from_scratch: bool = False
    focus: bool = True
    freeze_base: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    gradient_checkpointing: bool = False
    license: str | None = None
    language: list[str] | None = None


@documented
@dataclass
class DataArguments(Checked):
    """What the model is trained and evaluated on: a data set by name, or local files.

    Args:
        dataset: data set name on the Hub, or a folder that `datasets` can load.
        dataset_config: configuration of the data set, where it has several.
        train_split: split to train on; slices such as train[:10%] work.
        eval_split: split to evaluate on. Default: validation or test if there, else a held-out share.
        train_files: local .txt, .json, .jsonl, .csv or .parquet files to train on.
        eval_files: local files to evaluate on. Default: a held-out share of the train files.
        eval_share: share held out for evaluation where nothing else is given; 0: no evaluation.
        sample_by: what one document of a .txt file is.
        bad_lines: refuse a .jsonl file with a corrupt line, naming it, or leave such lines out; when it is
            met, with streaming.
        text_column: column of the text. Default: text, or the only column of strings.
        text_pair_column: column of the second text (sequence classification of pairs).
        label_column: column of the label (sequence classification).
        tokens_column: column of the words, a list each row (token classification).
        tags_column: column of their tags (token classification).
        question_column: column of the question (question answering).
        context_column: column of the passage that holds the answer (question answering).
        answers_column: column of the answers, {'text': [...], 'answer_start': [...]} (question answering).
        doc_stride: tokens that two windows of a long passage share (question answering). Default: a quarter of
            block_size.
        source_column: column of the text to read; a.b is field b of column a (seq2seq).
        target_column: column of the text to write (seq2seq).
        source_prefix: put before every text to read, such as a task's name for T5 (seq2seq).
        audio_column: column of the recording (speech recognition); its text is in text_column.
        streaming: read the training data as training goes on, instead of preparing all of it first (causal LM).
        shuffle_buffer: documents of a stream that the next one is drawn from; 0: the order of the source.
        packing: joined: documents one after the other, cut into examples; separate: whole documents side by side, none
            of which attends to another (causal LM).
        block_size: tokens in an example. Default: 512, or the model's limit where that is less.
        max_train_examples: use the first N examples only.
        max_eval_examples: evaluate on the first N examples only.
        mlm_probability: share of the tokens to predict (masked LM).
        cache_dir: where `datasets` keeps what it prepared.

    Raises:
        FocusConfigError: a value of the wrong type or out of range.
    """

    # The heading under which `--help` lists them
    _argument_group_name = "Data"

    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    train_files: list[str] | None = None
    eval_files: list[str] | None = None
    eval_share: float = 0.05
    sample_by: Literal["document", "paragraph", "line"] = "document"
    bad_lines: Literal["error", "skip"] = "error"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str = "label"
    tokens_column: str = "tokens"
    tags_column: str = "ner_tags"
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    doc_stride: int | None = None
    source_column: str = "source"
    target_column: str = "target"
    source_prefix: str = ""
    audio_column: str = "audio"
    streaming: bool = False
    shuffle_buffer: int = 1000
    packing: Literal["joined", "separate"] = "joined"
    block_size: int | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    mlm_probability: float = 0.15
    cache_dir: str | None = None


@documented
@dataclass
class TrainArguments(Checked):
    """How training runs.

    Args:
        output_dir: where the model, its card, the log and the checkpoints go (required).
        task: causal-lm, masked-lm, sequence-classification, token-classification, question-answering, seq2seq or
            speech-recognition.
        objective: task: the task's own loss; match: teach layers limited by max_dist what the model's own attention
            gives, the base frozen; the first of two stages.
        resume: checkpoint folder to go on from, or 'latest' for the last one in output_dir.
        overwrite_output_dir: replace the log and checkpoints of an earlier run in output_dir.
        seed: seed of everything random.
        num_epochs: passes over the training data.
        max_steps: optimizer steps; wins over num_epochs.
        batch_size: examples in one forward pass, for each process.
        eval_batch_size: the same for evaluation. Default: batch_size.
        gradient_accumulation_steps: forward passes in one optimizer step.
        learning_rate: peak learning rate of the base model.
        focus_learning_rate: peak learning rate of FocusA. Default: learning_rate.
        weight_decay: AdamW weight decay; not on biases, norms, gains and vectors.
        adam_beta1: AdamW beta1.
        adam_beta2: AdamW beta2.
        adam_epsilon: AdamW epsilon.
        max_grad_norm: clip the gradient to this norm.
        schedule: schedule of the learning rate, after the warm-up.
        warmup_share: share of the steps in which the learning rate rises from 0.
        mixed_precision: type of the computation.
        torch_compile: compile the model's forward and backward pass.
        torch_compile_backend: the compiler's backend.
        cpu: run on the CPU even where there is a GPU.
        num_processes: fail unless this many processes run.
        num_workers: processes that prepare batches, for each training process.
        logging_steps: steps between lines of the log.
        eval_steps: steps between evaluations. Default: only at the end.
        eval_at_start: evaluate before the first step too.
        save_steps: steps between checkpoints. Default: none.
        save_limit: checkpoints to keep; the oldest go first, with load_best_model_at_end never the best.
        load_best_model_at_end: save a checkpoint at every evaluation that is the best so far, and end with the best.
        metric_for_best_model: result of the evaluation that says which is best.
        greater_is_better: whether it is better when greater. Default: by the metric.
        early_stopping_patience: stop after this many evaluations in a row that are not better. Default: never.
        early_stopping_threshold: an evaluation is better if by more than this.
        report_to: trackers of accelerate, for example tensorboard.
        progress_bar: show a progress bar.
        push_to_hub: push the model, tokenizer and card to the Hub at the end, with the token that `hf auth login`
            saved, or HF_TOKEN.
        hub_model_id: repository on the Hub, name or owner/name. Default: the name of output_dir.
        hub_private: a new repository is private.

    Raises:
        FocusConfigError: a value of the wrong type or out of range.
    """

    # The heading under which `--help` lists them
    _argument_group_name = "Training"

    output_dir: str = ""
    task: str = "causal-lm"
    objective: Literal["task", "match"] = "task"
    resume: str | None = None
    overwrite_output_dir: bool = False
    seed: int = 0
    num_epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-05
    focus_learning_rate: float | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-08
    max_grad_norm: float | None = 1.0
    schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    warmup_share: float = 0.03
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    cpu: bool = False
    num_processes: int | None = None
    num_workers: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    eval_at_start: bool = False
    save_steps: int | None = None
    save_limit: int | None = 2
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "loss"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    report_to: list[str] | None = None
    progress_bar: bool = True
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False


def _focus_arguments() -> type:
    texts = setting_texts(FocusConfig)
    settings = [
        (item.name, item.type, field(default=item.default, metadata={"help": texts[item.name]}))
        for item in fields(FocusConfig)
    ]
    members = {"to_config": _to_config, "__module__": __name__, "_argument_group_name": "FocusA"}
    return make_dataclass("FocusArguments", settings, namespace=members)


def _to_config(self: Any) -> FocusConfig:
    """The settings as a `FocusConfig`, which validates them."""
    return FocusConfig(**{item.name: getattr(self, item.name) for item in fields(FocusConfig)})


FocusArguments = _focus_arguments()
FocusArguments.__doc__ = "The settings of FocusA, one flag each: the fields of `FocusConfig`."


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults behind every flag, and the description as it was written."""


def parse_arguments(
    argv: Sequence[str], description: str | None = None, prog: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainArguments, Any]:
    """Model, data, train and FocusA arguments from flags, or from one YAML or JSON file with flags after it.

    Args:
        argv: `["--output-dir", "out", ...]` or `["run.yaml", ...]`; a flag wins over the file.
        description: shown by `--help`.
        prog: what messages call the program; None: the file that was started.

    Raises:
        FocusConfigError: the file is missing or no mapping, or a value is not accepted.
        SystemExit: a flag that does not exist, or `--help` (argparse).
    """
    groups = (ModelArguments, DataArguments, TrainArguments, FocusArguments)
    usage = "%(prog)s [run.yaml or run.json] [--flags]"
    parser = HfArgumentParser(groups, prog=prog, description=description, usage=usage, formatter_class=_HelpFormatter)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = [*_flags_of_file(argv[0], [item.name for group in groups for item in fields(group)]), *argv[1:]]
    # look_for_args_file: a file of flags beside the script would be read unasked
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)


_READERS = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}


def _flags_of_file(name: str, known: list[str]) -> list[str]:
    path = Path(name)
    if path.suffix not in _READERS or not path.is_file():
        raise FocusConfigError(bad_value("arguments", name, "flags, or an existing .yaml, .yml or .json file first"))
    try:
        values = _READERS[path.suffix](path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        # PyYAML's messages have a picture of the place, over several lines
        reason = " ".join(str(error).split())
        raise FocusConfigError(bad_value("arguments", name, f"a well-formed file ({reason})")) from error
    if not isinstance(values, dict):
        raise FocusConfigError(bad_value("arguments", name, "a file that holds one mapping of names to values"))
    flags: list[str] = []
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key not in known:
            raise FocusConfigError(bad_value("arguments", f"{name}: {key}", ", ".join(known)))
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        # One token, so that a value may begin with a dash
        flags += [f"--{key}={items[0]}"] if len(items) == 1 else [f"--{key}", *map(str, items)]
    return flags
