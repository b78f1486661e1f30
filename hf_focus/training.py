"""`finetune`: trains a model, with FocusA or without, on accelerate."""

from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, get_scheduler

from .arguments import DataArguments, ModelArguments, TrainArguments
from .batches import endless_batches
from .card_checks import check_card_names
from .checkpoints import Progress, checkpoint_of, name_failed_write, read_progress, remove_checkpoints
from .collators import ReproducibleCollator
from .configuration import FocusConfig
from .errors import FocusConfigError, FocusResumeError, bad_value
from .machine import is_sharded, open_accelerator
from .preparation import (
    check_focus_settings,
    check_model_arguments,
    check_objective,
    check_packing,
    choose_trained,
    find_block_size,
    find_source,
    load_model,
    merge_lora,
    parameter_groups,
)
from .run_card import write_run_card
from .run_data import describe_run, encode_data
from .run_log import RunLog, check_trackers
from .run_setup import check_best, check_output_dir, prepare_push, push_run
from .sharing import replace_model
from .streaming import check_stream
from .task_types import Encoded, Source, Task
from .tasks import find_task
from .training_loop import Run, rows_in_step, train


@dataclass
class FinetuneResult:
    """What a run leaves: `output_dir` holds the model, tokenizer, card, log, trackers and checkpoints.

    model: trained, LoRA merged, in eval mode. metrics: of it, empty without evaluation data.
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
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    train_dataset: Dataset | IterableDataset | None = None,
    eval_dataset: Dataset | IterableDataset | None = None,
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
        tokenizer: its tokenizer, or its processor if it hears.
        train_dataset, eval_dataset: documents as `datasets` rows, instead of those `data_args` names; without
            `eval_dataset`, `data_args.eval_share` is held out.

    Raises:
        FocusConfigError, FocusDataError, FocusResumeError: before the model or `output_dir` is changed; for a corrupt
            line of a stream, when it is met.
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
    check_stream(task, data_args, train_args, train_dataset)
    check_card_names(model_args.license, model_args.language)
    trackers = check_trackers(train_args.report_to)
    check_best(train_args, task)
    output_dir = Path(train_args.output_dir)
    checkpoint = check_output_dir(train_args, output_dir)
    if train_args.push_to_hub and not model_args.focus:
        raise FocusConfigError(bad_value("push_to_hub", True, "False with --no-focus: what is pushed carries FocusA"))
    with open_accelerator(train_args, trackers, output_dir) as accelerator:
        if model_args.lora_rank and is_sharded(accelerator):
            # Merged at the end, and the whole of a weight is nowhere
            raise FocusConfigError(bad_value("lora_rank", model_args.lora_rank, "0 where weights are sharded"))
        repo_id = prepare_push(accelerator, train_args)
        source = find_source(model_args, model, tokenizer, task.needs_features, task.splits_words)
        check_focus_settings(model_args, focus, source)
        check_objective(train_args, model_args, focus, source)
        data_args = replace(data_args, block_size=find_block_size(data_args.block_size, source))
        encoded = encode_data(accelerator, task, source, data_args, train_args, train_dataset, eval_dataset)
        description = describe_run(model_args, data_args, train_args, focus, source, encoded, accelerator)
        progress = Progress()
        if checkpoint:
            progress = read_progress(checkpoint, train_args.resume, description)
            best = checkpoint_of(output_dir, progress.best.step)
            if train_args.load_best_model_at_end and progress.best.step and not best.is_dir():
                accepted = f"one beside {best.name}, the best so far; or load_best_model_at_end False"
                raise FocusResumeError(bad_value("resume", train_args.resume, accepted))
        torch.manual_seed(train_args.seed)
        load_model(source, task, model_args, encoded.config)
        if data_args.packing == "separate":
            check_packing(source.model)
        trained = choose_trained(source, task, model_args, focus, train_args.seed)
        arguments = (model_args, data_args, train_args)
        result = _train(accelerator, task, source, trained, encoded, description, checkpoint, progress, arguments)
        if repo_id is not None and accelerator.is_main_process:
            result.url = push_run(result.output_dir, repo_id)
        return result


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
    collator = ReproducibleCollator(task.collator(source, data_args), task.count_targets, args.seed)
    processes = accelerator.num_processes
    train_loader = endless_batches(
        encoded.train,
        collator,
        args.batch_size,
        args.seed,
        first=progress.step * args.gradient_accumulation_steps * processes + accelerator.process_index,
        stride=processes,
        num_workers=args.num_workers,
        begun=progress.last_pass,
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
    # A stream has no length, and is trained on for `max_steps`
    rows = len(encoded.train) if isinstance(encoded.train, Dataset) else inf
    max_steps = args.max_steps or ceil(args.num_epochs * rows / rows_in_step(accelerator, args))
    scheduler = accelerator.prepare(
        get_scheduler(args.schedule, optimizer, ceil(args.warmup_share * max_steps), max_steps)
    )
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    run = Run(
        accelerator=accelerator,
        args=args,
        task=task,
        source=source,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        rows_in_pass=rows,
        eval_loader=eval_loader,
        log=RunLog(accelerator, output_dir, progress.step if checkpoint else None),
        output_dir=output_dir,
        description=description,
        max_steps=max_steps,
        progress=progress,
    )
    accelerator.init_trackers("hf_focus", {k: v for k, v in description.items() if isinstance(v, (int, float, str))})
    seconds, metrics = train(run)
    return _finish(run, arguments, seconds, metrics)


def _finish(
    run: Run,
    arguments: tuple[ModelArguments, DataArguments, TrainArguments],
    seconds: float,
    metrics: dict[str, float],
) -> FinetuneResult:
    """Save the model, what makes its inputs, and the card."""
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
        with name_failed_write(run.output_dir), TemporaryDirectory(dir=run.output_dir, prefix=".new-") as new:
            model.save_pretrained(new, state_dict=state)
            for part in filter(None, (run.source.tokenizer, run.source.features)):
                part.save_pretrained(new)
            write_run_card(Path(new), run, model, arguments, trained, seconds, metrics)
            replace_model(Path(new), run.output_dir)
    accelerator.wait_for_everyone()
    return FinetuneResult(
        run.output_dir, model, run.source.tokenizer, metrics, run.log.lines, run.progress.step, seconds
    )
