"""What a run trains on, and what tells it from other runs."""

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from .arguments import DataArguments, ModelArguments, TrainArguments
from .checkpoints import digest
from .configuration import FocusConfig
from .data import hold_out, load_documents
from .task_types import Encoded, Source, Task

# These change where a run writes and how it is watched, not what it computes
NOT_OF_THE_RUN = {
    "output_dir",
    "resume",
    "overwrite_output_dir",
    "num_processes",
    "num_workers",
    "logging_steps",
    "eval_steps",
    "eval_at_start",
    "eval_batch_size",
    "eval_split",
    "eval_files",
    "max_eval_examples",
    "save_steps",
    "save_limit",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "report_to",
    "progress_bar",
    "cache_dir",
    "license",
    "language",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    # The digest of the examples stands for these
    "dataset",
    "dataset_config",
    "train_split",
    "train_files",
    "sample_by",
    "bad_lines",
}


def encode_data(
    accelerator: Accelerator,
    task: Task,
    source: Source,
    args: DataArguments,
    train_args: TrainArguments,
    train_rows: Dataset | IterableDataset | None,
    eval_rows: Dataset | IterableDataset | None,
) -> Encoded:
    """The examples to train and evaluate on: of the rows given, or of those that the arguments name.

    Raises:
        FocusConfigError, FocusDataError: the data is missing, or does not fit the task or the tokenizer.
    """
    task.collator(source, args)
    # The first process prepares, the others read what it cached
    with accelerator.main_process_first():
        if train_rows is None:
            train_rows, eval_rows = load_documents(args, train_args.seed, task.by_character)
        elif eval_rows is None and args.eval_share:
            train_rows, eval_rows = hold_out(
                train_rows, args.eval_share, train_args.seed, args.text_column, task.by_character
            )
        encoded = task.encode(train_rows, eval_rows, source, args, args.block_size)

    def first(rows: Dataset | None, count: int | None) -> Dataset | None:
        return rows if count is None or not isinstance(rows, Dataset) else rows.select(range(min(count, len(rows))))

    return Encoded(
        first(encoded.train, args.max_train_examples),
        first(encoded.evaluation, args.max_eval_examples),
        encoded.config,
        encoded.identity,
    )


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    train_args: TrainArguments,
    focus: FocusConfig,
    source: Source,
    encoded: Encoded,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a run computes, as plain values: a checkpoint of another description is not resumed from."""
    settings = {**asdict(model_args), **asdict(data_args), **asdict(train_args)}
    description = {name: value for name, value in settings.items() if name not in NOT_OF_THE_RUN}
    config = source.config.to_dict()
    unrelated = (
        "architectures",
        "transformers_version",
        "dtype",
        "_name_or_path",
        "use_cache",
        "focus_config",
        "focus_architecture",
    )
    return {
        **description,
        "model_config": {name: value for name, value in sorted(config.items()) if name not in unrelated},
        "focus_settings": focus.to_dict() if model_args.focus else None,
        "training_data": encoded.identity or digest(encoded.train),
        "processes": accelerator.num_processes,
    }
