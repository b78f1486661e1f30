"""The model card of a fine-tuning run, with what FocusA learned in it and a picture."""

from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel

from .arguments import DataArguments, ModelArguments, TrainArguments
from .card_checks import is_hub_id
from .cards import CARD_FILE, PICTURE_FILE, CardFacts, model_card
from .evaluation import score_inputs
from .plots import mean_spans, plot_run
from .preparation import is_patched
from .recording import record_focus
from .training_loop import Run

# Figure of the evaluation -> what the card calls it, and how it gets there
_LEARNED = {
    "focus_span": ("span (tokens)", lambda value: value),
    "focus_span_fraction": ("span (share of the longest)", lambda value: value),
    "focus_coverage": ("sparsity (share of the keys in the span with next to no weight)", lambda value: 1 - value),
    "focus_entropy": ("entropy of the local attention (nats)", lambda value: value),
    "focus_iterations": ("attentions made by a query", lambda value: value),
}


def write_run_card(
    folder: Path,
    run: Run,
    model: PreTrainedModel,
    arguments: tuple[ModelArguments, DataArguments, TrainArguments],
    trained_parameters: int,
    seconds: float,
    metrics: dict[str, float],
) -> ModelCard:
    """Write `README.md`, and for a model with FocusA a picture (if matplotlib is installed), into a folder.

    Args:
        folder: where the model was saved.
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
    spans = _measure_spans(run, model) if patched else {}
    picture = None
    if spans and find_spec("matplotlib") is not None:
        picture = PICTURE_FILE
        plot_run(folder / picture, {"this run": run.log.lines}, spans)
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
            learned={
                label: change(metrics[name])
                for name, (label, change) in _LEARNED.items()
                if isfinite(metrics.get(name, float("nan")))
            },
            spans={layer: heads.tolist() for layer, heads in spans.items()},
            picture=picture,
            auto_class=run.task.auto_class.__name__,
            has_code=bool(getattr(model.config, "auto_map", None)),
            training=_training_table(run, model, model_args, args, trained_parameters, seconds),
        )
    )
    card.save(folder / CARD_FILE)
    return card


@torch.no_grad()
def _measure_spans(run: Run, model: PreTrainedModel) -> dict[str, Tensor]:
    """Mean span of each layer's heads on the first batch of the evaluation data; empty without such data.

    Taken from the data itself: reading a prepared loader is something that all processes do together.
    """
    if run.eval_loader is None:
        return {}
    rows, size = run.eval_loader.dataset, run.args.eval_batch_size or run.args.batch_size
    batch = run.eval_loader.collate_fn([rows[i] for i in range(min(size, len(rows)))])
    inputs = send_to_device(score_inputs(batch, run.task), model.device)
    with record_focus(model) as records:
        model(**inputs)
    return {layer: spans.cpu() for layer, spans in mean_spans(records).items()}


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
        "objective": "to match the model's own attention" if args.objective == "match" else None,
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
