"""The attention functions that FocusA's local branch is measured against, as a table of declarations."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .bench_cases import Call, Case, make_inputs

EVERYWHERE = ("cpu", "cuda")
SDPA_CAUSAL = "SDPA causal"
FLEX = "FlexAttention"
SEED_LOOP = "seed-style loop, 10 iterations"
SEED_ITERATIONS = 10


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Args:
        name: in the tables.
        build: a case -> the call that is timed; what a user would prepare once is prepared here.
        computes: what its function is, in words; those that say the same agree in numbers.
        needs: package it comes from.
        devices: where it runs.
        backward: where it has gradients.
        decodes: whether one query against a long cache makes sense.
        half_only: no float32.
        longest: more tokens would fill the memory with a mask of tokens × tokens.
    """

    name: str
    build: Callable[[Case], Call]
    computes: str
    needs: str | None = None
    devices: tuple[str, ...] = EVERYWHERE
    backward: tuple[str, ...] = EVERYWHERE
    decodes: bool = False
    half_only: bool = False
    longest: int | None = None

    def why_not(self, case: Case) -> str | None:
        """Why it cannot run a case; None: it can."""
        if case.device not in self.devices:
            return f"not on {case.device}"
        if case.training and case.device not in self.backward:
            return f"no backward on {case.device}"
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.half_only and case.dtype not in (torch.float16, torch.bfloat16):
            return f"no {str(case.dtype).removeprefix('torch.')}"
        if self.longest and case.length > self.longest:
            return f"a mask of {case.length} × {case.length}"
        return None


def _call(case: Case, function: Callable[..., Tensor]) -> Call:
    inputs = make_inputs(case)
    return Call(lambda: function(*inputs), inputs, case.training)


def _sdpa(is_causal: bool) -> Callable[[Case], Call]:
    return lambda case: _call(case, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=is_causal))


def band_mask(case: Case) -> Tensor:
    """(T, S) bool: True for the `span` keys up to the query's own."""
    keys = torch.arange(case.length, device=case.device)
    distance = keys[case.length - case.num_queries :, None] - keys
    return (distance >= 0) & (distance < case.span)


def _sdpa_band(case: Case) -> Call:
    mask = band_mask(case)
    return _call(case, lambda q, k, v: scaled_dot_product_attention(q, k, v, mask))


def _transformers_window(case: Case) -> Call:
    from transformers import MistralConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(sliding_window=case.span, attn_implementation="sdpa")
    shape = torch.empty(case.batch, case.length, 1, device=case.device, dtype=case.dtype)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A model makes the mask once a forward pass: here that is once a layer
        mask = create_sliding_window_causal_mask(config, shape, None, None)
        return sdpa_attention_forward(module, query, key, value, mask)[0].transpose(1, 2)

    return _call(case, forward)


def block_mask(case: Case, size: int = 128) -> object:
    """FlexAttention's block mask of the band, from arithmetic on blocks: `create_block_mask` asks every pair."""
    from torch.nn.attention.flex_attention import BlockMask

    count, span = -(-case.length // size), case.span
    blocks = torch.arange(count, device=case.device)
    first = (blocks * size - span + 1).clamp_min(0) // size
    # Whole blocks: entirely before the query block, and their first key within the last query's span
    low = (-((span - size * (blocks + 1)) // size)).clamp(min=first)
    low = torch.minimum(low, blocks)

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()

    keys, rows = blocks[None], blocks[:, None]
    reached = (keys >= first[:, None]) & (keys <= rows)
    whole = (keys >= low[:, None]) & (keys < rows)
    partial, full = ordered(reached & ~whole), ordered(whole)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < span)

    lengths = (case.length, case.length)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=lengths)


def _flex(case: Case) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    # One graph a length, more than the compiler keeps by default
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled, mask = torch.compile(flex_attention, dynamic=False), block_mask(case)
    return _call(case, lambda q, k, v: compiled(q, k, v, block_mask=mask))


def local_attention(parts: int, exact: bool = False) -> Callable[[Case], Call]:
    """local-attention with windows of span/parts tokens that look `parts` windows back; `exact` masks what lies
    further back than the span, the default sees up to a window more."""

    def build(case: Case) -> Call:
        from local_attention import LocalAttention

        layer = LocalAttention(case.span // parts, causal=True, look_backward=parts, exact_windowsize=exact)
        return _call(case, layer)

    return build


def _longformer(case: Case) -> Call:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    dims = case.heads * case.head_dim
    config = LongformerConfig(
        hidden_size=dims,
        num_attention_heads=case.heads,
        attention_window=[case.span],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0).to(case.device, case.dtype).requires_grad_(case.training)
    hidden = torch.randn(case.batch, case.length, dims, device=case.device, dtype=case.dtype)
    hidden.requires_grad_(case.training)
    mask = hidden.new_zeros(case.batch, case.length)
    nowhere = torch.zeros_like(mask, dtype=torch.bool)
    used = [p for part in (layer.query, layer.key, layer.value) for p in part.parameters()]

    def forward() -> Tensor:
        return layer(
            hidden,
            attention_mask=mask,
            is_index_masked=nowhere,
            is_index_global_attn=nowhere,
            is_global_attn=False,
        )[0]

    return Call(forward, [hidden, *used], case.training)


def _flash(case: Case) -> Call:
    from flash_attn import flash_attn_func

    # Its layout is (B, T, H, D)
    inputs = [x.detach().transpose(1, 2).contiguous().requires_grad_(case.training) for x in make_inputs(case)]
    window = (case.span - 1, 0)
    return Call(lambda: flash_attn_func(*inputs, causal=True, window_size=window), inputs, case.training)


def seed_loop(query: Tensor, key: Tensor, value: Tensor, span: int, iterations: int = SEED_ITERATIONS) -> Tensor:
    """The loop of the document that this library came from, made runnable and causal over the same `span` keys as the
    others: windows of `span` queries one after another, each attending to itself and the keys before it `iterations`
    times, unless the batch's mean change is small."""
    scale = query.shape[-1] ** -0.5
    positions = torch.arange(query.shape[2], device=query.device)
    windows = []
    for start in range(0, query.shape[2], span):
        first = max(0, start - span + 1)
        rows, keys, values = query[:, :, start : start + span], *(x[:, :, first : start + span] for x in (key, value))
        distance = positions[start : start + span, None] - positions[first : start + span]
        hidden = (distance < 0) | (distance >= span)
        previous = torch.zeros_like(rows)
        for _ in range(iterations):
            scores = (rows @ keys.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
            output = torch.softmax(scores, dim=-1) @ values
            change = (output - previous).abs().mean()
            if change < 1e-4 + 0.1 * change:
                break
            previous = output
            rows = rows + output
        windows.append(output)
    return torch.cat(windows, dim=2)


def _seed(case: Case) -> Call:
    return _call(case, lambda q, k, v: seed_loop(q, k, v, case.span))


_BAND = "softmax over the span"
OTHERS = (
    Contender("SDPA full", _sdpa(False), "softmax over all keys", decodes=True),
    Contender(SDPA_CAUSAL, _sdpa(True), "softmax over all keys before"),
    Contender("SDPA band mask", _sdpa_band, f"{_BAND}; mask made before", longest=2**15),
    Contender("transformers sliding window", _transformers_window, f"{_BAND}; mask made in the call", longest=2**15),
    Contender(FLEX, _flex, f"{_BAND}; compiled, block mask made before", backward=("cuda",)),
    Contender("flash-attn window", _flash, _BAND, needs="flash_attn", devices=("cuda",), half_only=True),
    *(
        Contender(
            f"local-attention, span/{parts} × {parts}",
            local_attention(parts),
            "softmax over the span and up to a window more",
            needs="local_attention",
        )
        for parts in (1, 2, 4)
    ),
    Contender("Longformer, with projections", _longformer, "softmax over half the span on either side"),
    Contender(SEED_LOOP, _seed, "iterated softmax over the span, additive feedback"),
)
