"""What a model of the evidence costs: keys read, cache, floating-point operations, and time."""

import time
from collections.abc import Sequence
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from .branch import FocusBranch
from .claims import attention_spread
from .evidence_attention import RAMP
from .focus_cache import FocusCache, SinkWindowLayer
from .interface import global_name
from .recording import record_focus

# Tokens that are decoded one by one for their time
DECODED = 32


@torch.no_grad()
def keys_read(model: nn.Module, **inputs: torch.Tensor) -> dict[str, float]:
    """Keys that the last query of a causal model reads, means over layers, heads and examples.

    A query reads the keys of the global branch, and those of the local one's span with its soft edge; what both read
    counts once. Keys further than both need not be kept.

    Returns:
        keys_read; keys_kept: the most that any layer must keep; keys_share: read, as a share of all; with FocusA,
        local_keys: read by the local branch.
    """
    length = inputs["input_ids"].shape[1]
    read, kept, local = [], 0.0, []
    branches = [module for module in model.modules() if isinstance(module, FocusBranch)]
    spans = [module for module in model.modules() if hasattr(module, "evidence_span")]
    if branches:
        with record_focus(model) as records:
            model(**inputs)
        for branch, layer in zip(branches, records, strict=True):
            config, call = branch.config, records[layer][0]
            reach = (call.span[..., -1] + config.ramp).ceil().clamp(max=min(config.max_span, length))
            local.append(reach.mean().item())
            near = float(length if config.max_dist is None else min(config.max_dist, length))
            sinks = min(config.sink_tokens, length - near) if config.max_dist is not None else 0
            read.append((reach.clamp(min=near) + sinks).clamp(max=length).mean().item())
            kept = max(kept, min(length, max(near, config.max_span) + sinks))
    elif spans:
        reach = [(module.evidence_span.clamp(0, 1) * module.evidence_max_span + RAMP).ceil() for module in spans]
        read = [layer.clamp(max=length).mean().item() for layer in reach]
        # A layer keeps what its furthest head reads
        kept = max(layer.clamp(max=length).max().item() for layer in reach)
    else:
        read, kept = [float(length)], float(length)
    mean = sum(read) / len(read)
    found = {"keys_read": mean, "keys_kept": float(kept), "keys_share": mean / length}
    return found | ({"local_keys": sum(local) / len(local)} if local else {})


def _causal_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> int:
    """Of a fused attention's two products, which skips what lies in the future."""
    pairs = query[-2] * key[-2]
    if is_causal:
        pairs = query[-2] * (query[-2] + 1) // 2
    return 2 * query[0] * query[1] * pairs * (query[-1] + value[-1])


@torch.no_grad()
def count_flops(model: nn.Module, **inputs: Any) -> float:
    """Floating-point operations of a forward pass, a token. Training takes about three times as many.

    Causal attention counts the keys before each query only. Counted on the CPU, wherever the model is: the same
    everywhere.
    """
    model = deepcopy(model).cpu().eval()
    inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _causal_flops}
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        model(**inputs)
    return counter.get_total_flops() / inputs["input_ids"].shape[:2].numel()


@torch.no_grad()
def run_cost(model: PreTrainedModel, ids: Tensor, decoded: int = DECODED) -> dict[str, float]:
    """What a causal model costs on one text, with the cache that `generate` would give it.

    Args:
        ids: (1, T): the last `decoded` tokens are fed one by one, the others at once.

    Returns:
        prefill_seconds, decode_seconds: a token; of the process (all its threads) on a CPU, of the clock on a GPU.
        cache_bytes: after the prefill. effective_tokens, attended: as `claims.attention_spread`, of the attention of
        the last `decoded` queries, means over layers, heads and queries; of FocusA that of the global branch, and
        local_effective_tokens of the local one. The spread is left out of a model without eager attention.
    """
    was_training = model.training
    model.eval()
    prompt, rest = ids[:, :-decoded], ids[:, -decoded:]

    def prefilled() -> tuple[float, DynamicCache]:
        cache = _new_cache(model)
        started = _clock(ids.device)
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return _clock(ids.device) - started, cache

    # The first pass also allocates and warms up
    prefilled()
    seconds, cache = prefilled()
    found = {"prefill_seconds": seconds / prompt.shape[1], "cache_bytes": float(_bytes(cache))}
    steps = []
    for token in rest.split(1, dim=1):
        started = _clock(ids.device)
        model(input_ids=token, past_key_values=cache, use_cache=True)
        steps.append(_clock(ids.device) - started)
    found["decode_seconds"] = median(steps)
    found |= _spread(model, prefilled()[1], rest)
    model.train(was_training)
    return found


def _spread(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> dict[str, float]:
    before = global_name(model.config._attn_implementation)
    if before not in ("sdpa", "eager"):
        return {}
    length = cache.get_seq_length() + torch.arange(1, ids.shape[1] + 1, device=ids.device)
    branches = any(isinstance(module, FocusBranch) for module in model.modules())
    model.set_attn_implementation("eager")
    options = {"input_ids": ids, "past_key_values": cache, "use_cache": True, "output_attentions": True}
    found: dict[str, list[Tensor]] = {}
    if branches:
        with record_focus(model) as records:
            outputs = model(**options)
        found["local_effective_tokens"] = [call.entropy.exp().mean() for layer in records for call in records[layer]]
    else:
        outputs = model(**options)
    model.set_attn_implementation(before)
    for weights in outputs.attentions:
        spread = attention_spread(weights, length)
        for name in ("effective_tokens", "attended"):
            found.setdefault(name, []).append(spread[name].mean())
    return {name: torch.stack(values).mean().item() for name, values in found.items()}


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    settings = getattr(model.config, "focus_config", None)
    bounded = settings is not None and settings["max_dist"] is not None
    return FocusCache(model.config) if bounded else DynamicCache(config=model.config)


def _bytes(cache: DynamicCache) -> int:
    held = []
    for layer in cache.layers:
        held += [layer.keys, layer.values]
        if isinstance(layer, SinkWindowLayer):
            held += [layer.sink_keys, layer.sink_values]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
