"""Fine-tune a Hugging Face model with FocusA attention (or, with --no-focus, without) on any text.

    python scripts/finetune.py --model-name-or-path Qwen/Qwen3-0.6B --train-files book.txt --output-dir out
    python scripts/finetune.py run.yaml --learning-rate 1e-4          # settings from a file; flags win over it
    torchrun --nproc_per_node 2 scripts/finetune.py run.yaml --num-processes 2

Data: --dataset NAME from the Hub, or --train-files with local .txt, .json, .jsonl, .csv or .parquet files. Without
evaluation data of its own a share of the training data is held out (--eval-share).
What is trained: everything; --freeze-base trains FocusA alone; --lora-rank N gives the base LoRA.
--output-dir then holds the model (from_pretrained loads it), its model card, train_log.jsonl, the trackers' files and,
with --save-steps N, checkpoints; --resume latest goes on from the last one.
"""

import sys

from accelerate import PartialState

from hf_focus.arguments import parse_arguments
from hf_focus.errors import FocusError
from hf_focus.training import FinetuneResult, finetune


def summarize(result: FinetuneResult) -> str:
    """What the run ended with, in a few lines."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()) or "no evaluation data"
    return f"{result.steps} steps, {result.seconds:.1f} s in this call\n{metrics}\nsaved in {result.output_dir}"


def main(argv: list[str]) -> int:
    """Run with the arguments in `argv`. Returns the exit status: 0, or 2 for bad input."""
    try:
        result = finetune(*parse_arguments(argv, description=__doc__))
    except FocusError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(summarize(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
