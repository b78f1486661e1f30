"""Fine-tune a Hugging Face model with FocusA attention (or, with --no-focus, without): `hf-focus finetune` as a file,
for launchers that start one.

    python scripts/finetune.py --model-name-or-path Qwen/Qwen3-0.6B --train-files book.txt --output-dir out
    python scripts/finetune.py run.yaml --learning-rate 1e-4          # settings from a file; flags win over it
    accelerate launch scripts/finetune.py run.yaml --resume latest
    torchrun --nproc_per_node 2 scripts/finetune.py run.yaml --num-processes 2
"""

import sys

from hf_focus.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
