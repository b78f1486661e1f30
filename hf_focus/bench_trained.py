"""Inputs of local attention as a trained model makes them: on random ones hardly any query would ever stop."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .attention import keep_problems
from .configuration import FocusConfig
from .patching import apply_focus
from .stdlib_text import is_held_out, stdlib_files

BATCH = 2
BYTES = 256
# What of a problem is kept: all that a query's number of attentions depends on
PER_TOKEN = ("query", "key", "value", "span", "sharpness", "readout_weights", "rotation")
PER_HEAD = ("feedback_matrix", "mix", "gain")


def trained_inputs(
    path: Path, heads: int, head_dim: int, span: int, iterations: int, length: int, steps: int, device: str = "cpu"
) -> Path:
    """Train a small byte-level model on the standard library's text for a few steps, and save what its last layer's
    local attention is given on `length` bytes of held-out files. A file that exists is left.

    The text is read in chunks as long as those of the training, each at its own positions: nothing is further away
    than it was in training, a chunk's keys fit those of its neighbours, and a shorter length is a prefix.

    Args:
        path: folder of the files.
        steps: of training.

    Returns:
        The file: tensors (1, heads, length, …) and (heads, …) by name; the rotation is (2, 1, length, head_dim).
    """
    file = path / f"trained-rotated-{heads}x{head_dim}-span{span}-iterations{iterations}-steps{steps}-{length}.pt"
    if file.is_file():
        return file
    path.mkdir(parents=True, exist_ok=True)
    chunk = 2 * span
    model = _train(heads, head_dim, FocusConfig(max_span=span, max_iterations=iterations), chunk, steps, device)
    held_out = _text(True, length + chunk, device)[:length]
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, length, chunk):
        ids = held_out[start : start + chunk]
        positions = torch.arange(start, start + len(ids), device=device)
        with torch.no_grad(), keep_problems() as problems:
            model(ids[None], position_ids=positions[None], logits_to_keep=1, use_cache=False)
        for name in PER_TOKEN:
            if (tensor := getattr(problems[-1], name)) is not None:
                parts.setdefault(name, []).append(tensor.cpu())
    kept = {name: torch.cat(tensors, dim=2) for name, tensors in parts.items()}
    for name in PER_HEAD:
        if (tensor := getattr(problems[-1], name)) is not None:
            kept[name] = tensor.detach().cpu()
    # Written whole or not at all: a stopped run is resumed
    partial = file.with_suffix(".partial")
    torch.save(kept, partial)
    partial.replace(file)
    return file


def _train(heads: int, head_dim: int, config: FocusConfig, chunk: int, steps: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTES,
            hidden_size=heads * head_dim,
            intermediate_size=2 * heads * head_dim,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=2**20,
        )
    )
    apply_focus(model, config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = _text(False, steps * BATCH * chunk, device).view(steps, BATCH, chunk)
    for ids in text:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _text(held_out: bool, size: int, device: str) -> Tensor:
    """Bytes of the library's files, from the start again where there are too few."""
    text = bytearray()
    for name, content in stdlib_files():
        if is_held_out(name) == held_out:
            text += content.encode()
        if len(text) >= size:
            break
    while len(text) < size:
        text += text
    return torch.frombuffer(text[:size], dtype=torch.uint8).long().to(device)
