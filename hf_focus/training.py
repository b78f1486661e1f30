"""`finetune`: trains a model, with FocusA or without, on accelerate."""

import os
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from .arguments import DataArguments, ModelArguments, TrainArguments
from .batches import endless_batches
from .best import find_metric
from .card_checks import check_card_names
from .checkpoints import (
    Progress,
    checkpoint_of,
    digest,
    find_checkpoint,
    list_checkpoints,
    name_failed_write,
    read_progress,
    remove_checkpoints,
)
from .collators import ReproducibleCollator
from .configuration import FocusConfig
from .data import hold_out, load_documents
from .errors import FocusConfigError, FocusError, FocusHubError, FocusResumeError, bad_value
from .hub import prepare_repo
from .machine import is_sharded, open_accelerator
from .preparation import (
    Source,
    check_focus_settings,
    check_model_arguments,
    choose_trained,
    find_block_size,
    find_source,
    load_model,
    merge_lora,
    parameter_groups,
)
from .run_card import write_run_card
from .run_log import LOG_FILE, RunLog, check_trackers
from .sharing import push_folder, replace_model
from .tasks import Encoded, Task, find_task
from .training_loop import Run, train

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


@dataclass
class FinetuneResult:
    """What a run leaves: `output_dir` holds the model, tokenizer, card, log, trackers and checkpoints.

    model: trained, LoRA merged, in eval mode. metrics: of the last evaluation, empty without evaluation data.
    log: the lines of train_log.jsonl. steps: optimizer steps made, those before a resume included. seconds: wall clock
    of this call's training loop. url: of the commit on the Hub, on the main process, if the run was to push.
    """

    output_dir: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]
    log: list[dict[str, Any]]
    steps: int
    seconds: float
    url: str | None = None


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    train_args: TrainArguments,
    focus: Any = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
) -> FinetuneResult:
    """Fine-tune a model and save it in `train_args.output_dir`, where `from_pretrained` loads it.

    ```python
    finetune(
        ModelArguments("Qwen/Qwen3-0.6B"),
        DataArguments(train_files=["book.txt"]),
        TrainArguments(output_dir="qwen3-focus", max_steps=100),
        FocusConfig(max_span=128),
    )
    ```

    Args:
        model_args, data_args, train_args: see their fields, or `scripts/finetune.py --help`.
        focus: a `FocusConfig`, a dict of its settings or a `FocusArguments`; None: the defaults.
        model: an already built model, trained in place, instead of the one `model_args` names.
        tokenizer: its tokenizer.
        train_dataset, eval_dataset: documents as `datasets` rows, instead of those `data_args` names; without
            `eval_dataset`, `data_args.eval_share` is held out.

    Raises:
        FocusConfigError, FocusDataError, FocusResumeError: before the model or `output_dir` is changed.
        UnsupportedArchitectureError, NoMatchingLayerError: before the model is changed.
        FocusHubError: before the training, if the Hub would not take the model; after it, if the push failed; the
            model is saved then.
        FocusError: the loss is no longer finite; checkpoints stay.
        FocusInterruptedError: the run was ended from outside, and can go on.
        FocusOutputError: `output_dir` cannot be written to.
    """
    task = find_task(train_args.task)
    focus = focus.to_config() if hasattr(focus, "to_config") else FocusConfig.build(focus)
    check_model_arguments(model_args, model)
    check_card_names(model_args.license, model_args.language)
    trackers = check_trackers(train_args.report_to)
    _check_best(train_args, task)
    output_dir = Path(train_args.output_dir)
    checkpoint = _check_output_dir(train_args, output_dir)
    if train_args.push_to_hub and not model_args.focus:
        raise FocusConfigError(bad_value("push_to_hub", True, "False with --no-focus: what is pushed carries FocusA"))
    with open_accelerator(train_args, trackers, output_dir) as accelerator:
        repo_id = _prepare_push(accelerator, train_args)
        source = find_source(model_args, model, tokenizer)
        check_focus_settings(model_args, focus, source)
        data_args = replace(data_args, block_size=find_block_size(data_args.block_size, source))
        encoded = _encode(accelerator, task, source, data_args, train_args, train_dataset, eval_dataset)
        description = _describe(model_args, data_args, train_args, focus, source, encoded, accelerator)
        progress = Progress()
        if checkpoint:
            progress = read_progress(checkpoint, train_args.resume, description)
            best = checkpoint_of(output_dir, progress.best.step)
            if train_args.load_best_model_at_end and progress.best.step and not best.is_dir():
                accepted = f"one beside {best.name}, the best so far; or load_best_model_at_end False"
                raise FocusResumeError(bad_value("resume", train_args.resume, accepted))
        if model_args.lora_rank and is_sharded(accelerator):
            # Merged at the end, and the whole of a weight is nowhere
            raise FocusConfigError(bad_value("lora_rank", model_args.lora_rank, "0 where weights are sharded"))
        torch.manual_seed(train_args.seed)
        load_model(source, task, model_args, encoded.config)
        trained = choose_trained(source, task, model_args, focus, train_args.seed)
        arguments = (model_args, data_args, train_args)
        result = _train(accelerator, task, source, trained, encoded, description, checkpoint, progress, arguments)
        if repo_id is not None and accelerator.is_main_process:
            result.url = _push(result.output_dir, repo_id)
        return result


def _prepare_push(accelerator: Accelerator, args: TrainArguments) -> str | None:
    """The repository to push to, asked before hours of training; every process raises what the main one met."""
    if not args.push_to_hub:
        return None
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            answer[0] = prepare_repo(name, private=args.hub_private or None)
        except FocusError as error:
            answer[0] = error
    broadcast_object_list(answer)
    if isinstance(answer[0], FocusError):
        raise answer[0]
    return answer[0]


def _push(output_dir: Path, repo_id: str) -> str:
    try:
        return push_folder(output_dir, repo_id).commit_url
    except FocusError as error:
        raise FocusHubError(f"The model is saved in {output_dir}, and was not pushed to {repo_id}: {error}") from error


def _check_output_dir(args: TrainArguments, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if any; another run's folder is neither written to nor taken over."""
    checkpoint = None
    existing = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise FocusConfigError(bad_value("output_dir", str(output_dir), "a folder that can be written to"))
    if args.resume:
        if args.overwrite_output_dir:
            raise FocusConfigError(bad_value("overwrite_output_dir", True, "False with --resume"))
        checkpoint = find_checkpoint(args.resume, output_dir)
        if checkpoint.parent.resolve() == output_dir.resolve():
            return checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise FocusConfigError(bad_value("output_dir", str(output_dir), "a folder, or a name that is still free"))
    if not args.overwrite_output_dir and ((output_dir / LOG_FILE).exists() or list_checkpoints(output_dir)):
        accepted = "a folder without an earlier run; --resume latest goes on, --overwrite-output-dir starts anew"
        raise FocusConfigError(bad_value("output_dir", str(output_dir), accepted))
    return checkpoint


def _check_best(args: TrainArguments, task: Task) -> None:
    """Refuse to look for the best evaluation where there are none."""
    find_metric(args.metric_for_best_model, task.reported)
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, name) and not args.eval_steps:
            raise FocusConfigError(bad_value(name, getattr(args, name), "False or None without --eval-steps"))


def _encode(
    accelerator: Accelerator,
    task: Task,
    source: Source,
    args: DataArguments,
    train_args: TrainArguments,
    train_rows: Dataset | None,
    eval_rows: Dataset | None,
) -> Encoded:
    task.collator(source.tokenizer, args)
    # The first process prepares, the others read what it cached
    with accelerator.main_process_first():
        if train_rows is None:
            train_rows, eval_rows = load_documents(args, train_args.seed, task.by_character)
        elif eval_rows is None and args.eval_share:
            train_rows, eval_rows = hold_out(
                train_rows, args.eval_share, train_args.seed, args.text_column, task.by_character
            )
        encoded = task.encode(train_rows, eval_rows, source.tokenizer, args, args.block_size)

    def first(rows: Dataset | None, count: int | None) -> Dataset | None:
        return rows if rows is None or count is None else rows.select(range(min(count, len(rows))))

    return Encoded(
        first(encoded.train, args.max_train_examples),
        first(encoded.evaluation, args.max_eval_examples),
        encoded.config,
    )


def _describe(
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
        "training_data": digest(encoded.train),
        "processes": accelerator.num_processes,
    }


def _train(
    accelerator: Accelerator,
    task: Task,
    source: Source,
    model: nn.Module,
    encoded: Encoded,
    description: dict[str, Any],
    checkpoint: Path | None,
    progress: Progress,
    arguments: tuple[ModelArguments, DataArguments, TrainArguments],
) -> FinetuneResult:
    _, data_args, args = arguments
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if args.overwrite_output_dir:
            remove_checkpoints(output_dir)
    collator = ReproducibleCollator(task.collator(source.tokenizer, data_args), task.count_targets, args.seed)
    stride = accelerator.num_processes
    train_loader = endless_batches(
        encoded.train,
        collator,
        args.batch_size,
        args.seed,
        first=progress.step * args.gradient_accumulation_steps * stride + accelerator.process_index,
        stride=stride,
        num_workers=args.num_workers,
    )
    eval_loader = None
    if encoded.evaluation is not None:
        fixed = ReproducibleCollator(collator.inner, task.count_targets, args.seed)
        eval_size = args.eval_batch_size or args.batch_size
        eval_loader = accelerator.prepare(
            DataLoader(encoded.evaluation, eval_size, collate_fn=fixed, num_workers=args.num_workers)
        )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args), betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )
    if args.torch_compile:
        # In place: names of the weights stay, and whatever wraps the model calls what is compiled
        model.compile(backend=args.torch_compile_backend)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Found by accelerate only where it prepares the loader of the batches
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    rows_in_step = args.batch_size * args.gradient_accumulation_steps * stride
    max_steps = args.max_steps or ceil(args.num_epochs * len(encoded.train) / rows_in_step)
    scheduler = accelerator.prepare(
        get_scheduler(args.schedule, optimizer, ceil(args.warmup_share * max_steps), max_steps)
    )
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    run = Run(
        accelerator=accelerator,
        args=args,
        task=task,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        steps_in_pass=len(encoded.train) / rows_in_step,
        eval_loader=eval_loader,
        log=RunLog(accelerator, output_dir, progress.step if checkpoint else None),
        output_dir=output_dir,
        description=description,
        max_steps=max_steps,
        progress=progress,
    )
    accelerator.init_trackers("hf_focus", {k: v for k, v in description.items() if isinstance(v, (int, float, str))})
    seconds, metrics = train(run)
    return _finish(run, source.tokenizer, arguments, seconds, metrics)


def _finish(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    arguments: tuple[ModelArguments, DataArguments, TrainArguments],
    seconds: float,
    metrics: dict[str, float],
) -> FinetuneResult:
    """Save the model, the tokenizer and the card."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    # Of sharded weights each process holds a part: all of them put the whole together
    state = accelerator.get_state_dict(run.model) if is_sharded(accelerator) else None
    model = accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    # What `compile` set, and nothing else undoes
    model._compiled_call_impl = None
    model = merge_lora(model).eval()
    if arguments[0].gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if accelerator.is_main_process:
        # Beside, then moved: a run that is stopped now leaves what was there before
        with (
            name_failed_write(run.output_dir),
            TemporaryDirectory(dir=run.output_dir, prefix=".new-") as new,
        ):
            model.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            write_run_card(Path(new), run, model, arguments, trained, seconds, metrics)
            replace_model(Path(new), run.output_dir)
    accelerator.wait_for_everyone()
    return FinetuneResult(run.output_dir, model, tokenizer, metrics, run.log.lines, run.progress.step, seconds)
