"""`FocusA`: the seed's layer, alone, for use outside transformers' models."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .band_attention import band_attention
from .branch import FocusBranch
from .configuration import FocusConfig
from .errors import FocusConfigError, bad_value
from .global_branch import attend_block, plain_mask
from .masks import limit_distance
from .model_masks import is_traced
from .refiner import Refiner


class GlobalAttention(nn.Module):
    """Multi-head attention of the global branch (the seed's `MultiheadC`): query, key without bias, value, out.

    Args:
        dims: features of the input.
        heads: H; divides `dims`.
        max_dist: how far it looks, in tokens; None: everywhere.
        sink_tokens: first tokens that stay visible under `max_dist`.
    """

    def __init__(self, dims: int, heads: int, max_dist: int | None = None, sink_tokens: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.max_dist = max_dist
        self.sink_tokens = sink_tokens
        self.query = nn.Linear(dims, dims)
        self.key = nn.Linear(dims, dims, bias=False)
        self.value = nn.Linear(dims, dims)
        self.out = nn.Linear(dims, dims)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, T, dims), attention_mask broadcastable to (B, H, T, T) -> (B, T, dims)."""
        query, key, value = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        length = x.shape[1]
        limited = self.max_dist is not None and self.max_dist < length
        if limited and attention_mask is None and not is_traced():
            mask = plain_mask(query, length, is_causal)
            output = band_attention(attend_block, query, key, value, mask, self.max_dist, self.sink_tokens, is_causal)
            return self.out(output.flatten(2))
        if limited:
            dtype = torch.bool if attention_mask is None else attention_mask.dtype
            attention_mask = limit_distance(
                attention_mask, length, length, 0, is_causal, self.max_dist, self.sink_tokens, dtype, x.device
            )
        output = scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=is_causal and attention_mask is None
        )
        return self.out(output.transpose(1, 2).flatten(2))


class FocusA(nn.Module):
    """The seed's layer: ln_b → global branch; ln_a → local branch with q = k = v; dense projection of both.

    ```python
    layer = FocusA(dims=512, heads=8, max_dist=512, sharpen=True, win_size=256, max_span=512)
    y = layer(x)                                        # x, y: (B, T, 512)
    ```

    Args:
        dims: features of input and output.
        heads: H; divides `dims`.
        max_dist: how far the global branch looks, in tokens; None: everywhere.
        refiner: whether a Q-table corrects the span, or the `Refiner` that does.
        sharpen: which of the seed's temperatures, see `FocusConfig`.
        win_size: width of the predictor's `"window"` pooling, in tokens; the seed's windows of queries are not needed,
            since here every query has a span of its own.
        max_span: keys that the local branch can reach, in tokens.
        is_causal: whether tokens see only the past. Then the predictor reads the token itself, else the mean of the
            sequence as in the seed, unless `span_granularity` says otherwise.
        settings: other settings of `FocusConfig`. The seed's are the defaults here: one span in all, its temperature,
            additive feedback, the last iterate, 10 iterations, a dense projection.

    Raises:
        FocusConfigError: a value out of range, or `dims` that `heads` does not divide.
    """

    SEED_SETTINGS = {  # noqa: RUF012
        "per_head_span": False,
        "temperature": "seed",
        "feedback": "additive",
        "readout": "last",
        "combine": "projection",
        "reward": "seed",
        "max_iterations": 10,
        "sink_tokens": 0,
    }

    def __init__(
        self,
        dims: int,
        heads: int,
        max_dist: int | None = None,
        refiner: bool | Refiner = True,
        sharpen: bool = True,
        win_size: int = 256,
        max_span: int = 256,
        is_causal: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(refiner, (bool, Refiner)):
            raise FocusConfigError(bad_value("refiner", refiner, "True, False or a Refiner"))
        if not isinstance(heads, int) or heads < 1:
            raise FocusConfigError(bad_value("heads", heads, "an int >= 1"))
        if not isinstance(dims, int) or dims < 1 or dims % heads:
            raise FocusConfigError(bad_value("dims", dims, f"an int >= 1 that heads={heads} divides"))
        defaults = {**self.SEED_SETTINGS, "span_granularity": "token" if is_causal else "sequence"}
        own = {
            "max_dist": max_dist,
            "refiner": refiner if isinstance(refiner, bool) else True,
            "sharpen": sharpen,
            "max_span": max_span,
        }
        self.config = FocusConfig.build({**defaults, **own, "window_size": win_size}, **settings)
        if is_causal and self.config.span_granularity != "token":
            accepted = "'token' with is_causal=True, since a mean would show a token its future"
            raise FocusConfigError(bad_value("span_granularity", self.config.span_granularity, accepted))
        if self.config.feedback_through == "layer":
            accepted = "'features': here the features of a head are its query, and there is no projection between them"
            raise FocusConfigError(bad_value("feedback_through", self.config.feedback_through, accepted))
        if self.config.global_exponent_start is not None:
            accepted = "None: the global attention of this layer is as in the seed"
            raise FocusConfigError(bad_value("global_exponent_start", self.config.global_exponent_start, accepted))
        self.is_causal = is_causal
        self.heads = heads
        self.ln_a = nn.LayerNorm(dims)
        self.ln_b = nn.LayerNorm(dims)
        self.attn_global = GlobalAttention(dims, heads, max_dist, self.config.sink_tokens)
        self.focus = FocusBranch(self.config, heads, dims // heads, dims // heads, join=False)
        if isinstance(refiner, Refiner):
            self.focus.refiner = refiner
        self.projection = nn.Linear(2 * dims, dims)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x: (B, T, dims).
            attention_mask: (B, T) with 1 or True for tokens and 0 or False for padding, or broadcastable to
                (B, H, T, T), bool or additive; None: all are tokens.

        Returns:
            (B, T, dims).
        """
        if x.ndim != 3 or x.shape[2] != self.projection.out_features:
            raise FocusConfigError(bad_value("x", tuple(x.shape), f"(B, T, {self.projection.out_features})"))
        if attention_mask is not None:
            attention_mask = self._full_mask(attention_mask, x)
        local = split_heads(self.ln_a(x), self.heads)
        globe = self.attn_global(self.ln_b(x), attention_mask, self.is_causal)
        output = self.focus.attend(
            local, local, local, globe.unflatten(-1, (self.heads, -1)), attention_mask, is_causal=self.is_causal
        )
        return self.projection(torch.cat([output.transpose(1, 2).flatten(2), globe], dim=-1))

    def _full_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        full = (batch, self.heads, length, length)
        if mask.shape == (batch, length):
            mask = mask[:, None, None].bool()
        elif mask.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
            raise FocusConfigError(bad_value("attention_mask", tuple(mask.shape), f"{full[:1] + full[2:3]} or {full}"))
        elif not mask.is_floating_point():
            mask = mask.bool()
        mask = mask.expand(-1, -1, length, length)
        if not self.is_causal:
            return mask
        past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, torch.finfo(mask.dtype).min)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H·D) -> (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
