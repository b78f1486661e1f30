"""Whole models of the benchmark: the original, and the same weights with FocusA, as a user runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .bench_cases import Call
from .configuration import FocusConfig
from .patching import apply_focus
from .recording import record_focus

ORIGINAL = "original"
PATCHED = "patched"
LIMITED = "patched, max_dist"
# The limited global branch looks this many spans far: 1024 tokens at the default span
DIST_IN_SPANS = 4
CHUNK = 2048
PROBE = 512

MODELS: dict[str, Callable[[int], FocusConfig | None]] = {
    ORIGINAL: lambda span: None,
    PATCHED: lambda span: FocusConfig(max_span=span),
    LIMITED: lambda span: FocusConfig(max_span=span, max_dist=DIST_IN_SPANS * span),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads × {self.hidden // self.heads}"
        return f"Llama {self.hidden}, {self.layers} layers, {heads}, {self.intermediate}, vocabulary {self.vocab}"


SHAPES = {
    "cpu": ModelShape(512, 4, 8, 8, 1376, 32000),
    # Llama-3.2-1B
    "cuda": ModelShape(2048, 16, 32, 8, 8192, 128256),
    "quick": ModelShape(128, 2, 2, 2, 344, 1000),
}


@dataclass(frozen=True)
class ModelCase:
    """One size of the model suites."""

    shape: ModelShape
    length: int
    span: int
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def ids(self, length: int | None = None) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.randint(self.shape.vocab, (self.batch, length or self.length), generator=noise).to(self.device)


@lru_cache(maxsize=len(MODELS))
def build_model(name: str, shape: ModelShape, span: int, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of `MODELS` with random weights, the same for all; FocusA's are off their start, where its output would
    be the original's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2**20,
    )
    # A CPU draws a billion numbers one after another
    with torch.device(device):
        model = LlamaForCausalLM(config)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            # At its start a model attends to everything alike: all iterations would give the same, and stop
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
        model.to(device, dtype)
        if (focus_config := MODELS[name](span)) is not None:
            # After the change of dtype, as on a loaded model
            apply_focus(model, focus_config).to(device)
            for path, parameter in model.named_parameters():
                if ".focus." in path:
                    parameter.add_((0.02 * torch.randn(parameter.shape, generator=noise)).to(parameter))
    return model.eval()


def forget_models() -> None:
    """Let go of the models that `build_model` keeps."""
    build_model.cache_clear()


def _build(name: str, case: ModelCase) -> PreTrainedModel:
    return build_model(name, case.shape, case.span, case.device, case.dtype)


def _iterations(model: PreTrainedModel, case: ModelCase) -> dict[str, float]:
    """How many attentions a query makes in this model, on a short input."""
    if not hasattr(model, "focus_config"):
        return {}
    was_training = model.training
    with record_focus(model.eval()) as records, torch.no_grad():
        model(case.ids(min(case.length, PROBE)), logits_to_keep=1, use_cache=False)
    model.train(was_training)
    means = [call.iterations.float().mean().item() for layer in records for call in records[layer]]
    return {"mean_iterations": sum(means) / len(means)}


def prefill(name: str, case: ModelCase) -> Call:
    """A forward pass over the whole input for the next token: what generation begins with."""
    model, ids = _build(name, case).eval(), case.ids()
    return Call(lambda: model(ids, logits_to_keep=1).logits, facts=lambda: _iterations(model, case))


def decode(name: str, case: ModelCase) -> Call:
    """One more token after a context of `length`, whose cache a prefill in chunks has filled."""
    model, ids = _build(name, case).eval(), case.ids()
    cache = None
    with torch.no_grad():
        for start in range(0, case.length, CHUNK):
            chunk = ids[:, start : start + CHUNK]
            cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def forward() -> Tensor:
        # The cache grows by a token a call, as in generation: a few among thousands
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits

    return Call(forward, facts=lambda: _iterations(model, case))


class TrainStep(Call):
    """Forward with labels, backward and a step of AdamW, in training mode."""

    def __init__(self, name: str, case: ModelCase) -> None:
        model, ids = _build(name, case), case.ids()
        super().__init__(lambda: model(ids, labels=ids).loss, facts=lambda: _iterations(model, case))
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run(self) -> None:
        self.model.train()
        self.forward().backward()
        self.optimizer.step()
        # At once, so that only one model at a time holds gradients
        self.optimizer.zero_grad()
