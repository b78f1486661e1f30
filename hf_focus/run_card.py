"""The model card of a fine-tuning run."""

from math import isfinite
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .arguments import DataArguments, ModelArguments, TrainArguments
from .cards import CardFacts, is_hub_id, model_card
from .preparation import is_patched
from .training_loop import Run

CARD_FILE = "README.md"


def write_run_card(
    run: Run,
    model: PreTrainedModel,
    arguments: tuple[ModelArguments, DataArguments, TrainArguments],
    trained_parameters: int,
    seconds: float,
    metrics: dict[str, float],
) -> ModelCard:
    """Write `README.md` into the run's output folder.

    Args:
        run: finished.
        model: as it was saved.
        arguments: of the run.
        trained_parameters: how many were trained.
        seconds: of the training loop.
        metrics: of the last evaluation; only what the task reports, and is finite, enters the card.
    """
    model_args, data_args, args = arguments
    base = None if model_args.from_scratch else model_args.model_name_or_path
    base_name = base.rpartition("/")[2] if is_hub_id(base) else model.config.model_type.removeprefix("focus_")
    patched = is_patched(model)
    card = model_card(
        CardFacts(
            name=f"{base_name}-focus" if patched else f"{base_name}-finetuned",
            pipeline_tag=run.task.pipeline_tag,
            base_model=base,
            license=model_args.license,
            language=model_args.language,
            dataset=data_args.dataset,
            dataset_config=data_args.dataset_config,
            eval_split=data_args.eval_split,
            metrics={name: metrics[name] for name in run.task.reported if name in metrics and isfinite(metrics[name])},
            focus=model.focus_config.to_dict() if patched else None,
            training=_training_table(run, model, model_args, args, trained_parameters, seconds),
        )
    )
    card.save(run.output_dir / CARD_FILE)
    return card


def _training_table(
    run: Run,
    model: PreTrainedModel,
    model_args: ModelArguments,
    args: TrainArguments,
    trained_parameters: int,
    seconds: float,
) -> dict[str, Any]:
    processes = run.accelerator.num_processes
    effective = args.batch_size * args.gradient_accumulation_steps * processes
    last = next((line for line in reversed(run.log.lines) if "loss" in line), {})
    table = {
        "task": args.task,
        "parameters": f"{model.num_parameters():,}, of which {trained_parameters:,} were trained",
        "steps": run.progress.step,
        "examples a step": f"{effective} ({args.batch_size} x {args.gradient_accumulation_steps} x {processes})",
        "tokens an example, at most": run.description["block_size"],
        "learning rate": f"{args.learning_rate:g}, {args.schedule}, warm-up over {args.warmup_share:.0%}",
        "learning rate of FocusA": f"{args.focus_learning_rate or args.learning_rate:g}",
        "optimizer": f"AdamW, betas {args.adam_beta1:g} and {args.adam_beta2:g}, weight decay {args.weight_decay:g}",
        "precision": f"{model_args.dtype} weights, mixed precision: {args.mixed_precision}",
        "LoRA": f"rank {model_args.lora_rank}, merged" if model_args.lora_rank else None,
        "base frozen": "yes" if model_args.freeze_base else None,
        "loss of the last logged steps": f"{last['loss']:.4f}" if "loss" in last else None,
        "seed": args.seed,
        "seconds": f"{seconds:.0f}",
    }
    return {name: value for name, value in table.items() if value is not None}
