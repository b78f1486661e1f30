"""The metrics of a saved model on data: what `hf-focus evaluate` prints."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from datasets import ClassLabel, Dataset, List
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from .arguments import DataArguments, ModelArguments
from .collators import ReproducibleCollator
from .configuration import FocusConfig
from .data import load_documents, load_files
from .errors import FocusConfigError, FocusDataError, bad_value
from .evaluation import evaluate_model
from .preparation import check_packing, choose_trained, find_block_size, find_source, load_model
from .tasks import find_task


def evaluation_rows(args: DataArguments, seed: int = 0, by_character: bool = True) -> Dataset:
    """The documents that fine-tuning with the same arguments evaluates on; `eval_files` alone are enough.

    Raises:
        FocusDataError: nothing to evaluate on is named, or it is not found.
    """
    if args.eval_files:
        return load_files(args.eval_files, "eval_files", args.sample_by, args.cache_dir, args.bad_lines)
    if not args.dataset and not args.train_files:
        accepted = "--eval-files, --dataset, or --train-files of which --eval-share is held out"
        raise FocusDataError(bad_value("eval_files", None, accepted))
    if args.dataset and args.eval_split:
        # The split to train on is not needed, and may be large
        args = replace(args, train_split=args.eval_split)
    rows = load_documents(args, seed, by_character)[1]
    if rows is None:
        raise FocusDataError(bad_value("eval_share", args.eval_share, "a share above 0, where nothing else is named"))
    return rows


def evaluate_saved(
    model_args: ModelArguments,
    data_args: DataArguments,
    task_name: str = "causal-lm",
    *,
    batch_size: int = 8,
    seed: int = 0,
    cpu: bool = False,
    show_progress: bool = False,
) -> dict[str, float]:
    """Load a model, with FocusA or without, and score it as `finetune` does.

    ```python
    evaluate_saved(ModelArguments("qwen3-focus"), DataArguments(eval_files=["held-out.txt"]))
    ```

    Args:
        model_args: which model, and how to load it; what concerns training is not read.
        data_args: as for `finetune`; `eval_files` alone are enough.
        task_name: a task of `tasks.TASKS`.
        batch_size: examples in one forward pass.
        seed: of the held-out share and of what masked-lm masks.
        cpu: run on the CPU even where there is a GPU.
        show_progress: a progress bar.

    Returns:
        the metrics, see `evaluate_model`.

    Raises:
        FocusConfigError, FocusDataError: the model, its head for the task, or the data is missing.
    """
    task = find_task(task_name)
    model_args, data_args = replace(model_args, focus=False), replace(data_args, streaming=False)
    rows = evaluation_rows(data_args, seed, task.by_character)
    source = find_source(model_args, needs_features=task.needs_features, splits_words=task.splits_words)
    data_args = replace(data_args, block_size=find_block_size(data_args.block_size, source))
    collator = ReproducibleCollator(task.collator(source, data_args), task.count_targets, seed)
    labels = getattr(data_args, task.labels) if task.labels else None
    if labels in rows.column_names:
        rows = _numbered_labels(rows, labels, task.labels, source.config)
    examples = task.encode(rows, None, source, data_args, data_args.block_size).train
    if data_args.max_eval_examples is not None:
        examples = examples.select(range(min(data_args.max_eval_examples, len(examples))))
    load_model(source, task, model_args, {})
    if data_args.packing == "separate":
        check_packing(source.model)
    if source.new_parameters:
        accepted = f"a model with a trained head for {task.name}; {', '.join(source.new_parameters)} would be random"
        raise FocusConfigError(bad_value("model", model_args.model_name_or_path, accepted))
    model = choose_trained(source, task, model_args, FocusConfig(), seed)
    own_state = not is_initialized()
    try:
        accelerator = Accelerator(cpu=cpu)
        model, loader = accelerator.prepare(model, DataLoader(examples, batch_size, collate_fn=collator))
        return evaluate_model(accelerator, model, loader, task, source, show_progress)
    finally:
        if own_state:
            # A later call in this process may ask for another device
            AcceleratorState._reset_state()


def _numbered_labels(rows: Dataset, column: str, argument: str, config: PreTrainedConfig) -> Dataset:
    """The labels as the model numbers them, which need not be how this data alone would."""
    values, kind = rows[column], rows.features[column]
    feature = ClassLabel(names=[str(config.id2label[number]) for number in sorted(config.id2label)])
    if isinstance(kind, List):
        different = {label for row in values for label in row}
        numbers = label_numbers(different, getattr(kind.feature, "names", None), config, argument)
        values, feature = [[numbers[label] for label in row] for row in values], List(feature)
    else:
        numbers = label_numbers(values, getattr(kind, "names", None), config, argument)
        values = [numbers[label] for label in values]
    return rows.remove_columns(column).add_column(column, values, feature=feature)


def label_numbers(
    values: Iterable[Any], names: Sequence[str] | None, config: PreTrainedConfig, argument: str = "label_column"
) -> dict[Any, int]:
    """The model's number of each label: by its name where the model knows all of them, else labels are numbers.

    Args:
        values: the different labels of the data.
        names: names of labels that are numbers; None: they have none.
        config: of the model; `label2id` is read.
        argument: which named their column, for messages.

    Raises:
        FocusDataError: the model does not know the labels.
    """
    values = set(values)
    known = {str(label): int(number) for label, number in config.label2id.items()}
    count = len(known if names is None else names)
    are_numbers = all(isinstance(value, int) and 0 <= value < count for value in values)
    shown = {value: names[value] if names is not None and are_numbers else str(value) for value in values}
    if all(text in known for text in shown.values()):
        return {value: known[text] for value, text in shown.items()}
    if are_numbers and max(values) < len(known):
        return {value: value for value in values}
    accepted = f"the labels of the model, {', '.join(known)}"
    raise FocusDataError(bad_value(argument, sorted(map(str, shown.values())), accepted))
