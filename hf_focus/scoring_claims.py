"""The claims' measures of a saved model: what `hf-focus evaluate --claims` prints."""

import torch

from .arguments import DataArguments, ModelArguments
from .claims import measure_claims
from .folders import load_model
from .inspection_data import choose_texts
from .preparation import find_block_size, find_source
from .task_types import Source


def evaluate_claims(
    model_args: ModelArguments,
    data_args: DataArguments,
    task_name: str = "causal-lm",
    cpu: bool = False,
    show_progress: bool = False,
) -> dict[str, float]:
    """Load a model, with FocusA or without, and measure it with `measure_claims`.

    Args:
        model_args: which model, and how to load it; what concerns training is not read.
        data_args: names the texts, at most `max_eval_examples` (default 8) of at most `block_size` tokens; nothing
            named: source files of Python's standard library.
        task_name: a task of `tasks.TASKS`; a hidden number is asked for where it is `causal-lm`.
        cpu: run on the CPU even where there is a GPU.
        show_progress: progress bars.

    Returns:
        `claim_<name>` -> value.
    """
    texts, _ = choose_texts(None, data_args)
    tokenizer = find_source(model_args).tokenizer
    model = load_model(model_args.model_name_or_path, None, model_args.revision, model_args.trust_remote_code)
    model.to(device="cuda" if torch.cuda.is_available() and not cpu else "cpu", dtype=getattr(torch, model_args.dtype))
    size = find_block_size(data_args.block_size, Source(model.config, tokenizer))
    found = measure_claims(model, tokenizer, texts, size, task_name == "causal-lm", show_progress)
    return {f"claim_{name}": value for name, value in found.items()}
