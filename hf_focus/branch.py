"""`FocusBranch`: all that FocusA adds to one attention layer. It is the layer's submodule `focus`."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention import focus_attention
from .band_mask import BandMask
from .configuration import FocusConfig
from .correction import Correction, own_statistics
from .iteration import rotate_back, unit
from .kept_mass import kept_mass
from .masks import count_visible, gather_reach, own_key_visible, within_reach
from .observers import FocusRecord, is_observed, notify
from .penalty import note_mean_span
from .pooling import pool_global
from .problem import in_one_precision, without_autocast
from .refiner import Refiner
from .rotary import Rotation, rotate_slow_pairs
from .span import AdaptiveSpan, GlobalTemperature, Predictor, count_in_span


class FocusBranch(nn.Module):
    """Predictor, refiner, span, iterated local attention, read-out and join of one attention layer.

    Every weight starts so that the output is the global branch's, exactly: the join is P = [0, I] + W with W = 0, and
    F = I + `feedback_matrix` with zeros (with `feedback_through="layer"`, W_O·W_Q + `feedback_matrix`). Kept as
    differences, weight decay pulls towards the pretrained model. (`local_start` other than 0 is for models without a
    pretrained one: W starts at [local_start · I, 0].)

    Args:
        config: the settings.
        num_heads: H, query heads.
        head_dim: D of queries and keys.
        value_head_dim: Dv of values.
        join: whether the join with the global output is part of the branch; only `attend` may be called without.
    """

    def __init__(
        self, config: FocusConfig, num_heads: int, head_dim: int, value_head_dim: int, join: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        dims = num_heads * value_head_dim
        self.predictor = Predictor(dims, num_heads if config.per_head_span else 1, config.initial_span)
        temperature = (config.temperature, config.sharpen, config.temp_scale, config.exponent_start)
        self.span = AdaptiveSpan(num_heads, config.max_span, *temperature)
        self.refiner = (
            Refiner(actions=config.num_actions, alpha=config.alpha, gamma=config.gamma, epsilon=config.epsilon)
            if config.refiner
            else None
        )
        start = config.global_exponent_start
        self.global_temperature = None if start is None else GlobalTemperature(num_heads, start)
        # What a single iteration never uses would be a parameter without a gradient
        iterates = config.max_iterations > 1
        normalized = iterates and config.feedback == "normalized"
        mixture = iterates and config.readout == "mixture"
        self.feeds_keys = iterates and config.feedback_through == "keys"
        fed_dim = head_dim if self.feeds_keys else value_head_dim
        self.feedback_matrix = _parameter(iterates, num_heads, fed_dim, head_dim)
        self.mix = _parameter(normalized, num_heads)
        self.log_gain = _parameter(normalized, num_heads)
        self.readout_weight = _parameter(mixture, num_heads, head_dim, config.max_iterations)
        self.readout_bias = _parameter(mixture, num_heads, config.max_iterations)
        both = mixture and config.readout_from == "both"
        self.readout_global_weight = _parameter(both, num_heads, value_head_dim, config.max_iterations)
        dense = config.combine == "projection"
        shape = (2 * dims, dims) if dense else (num_heads, 2 * value_head_dim, value_head_dim)
        self.join = _parameter(join, *shape)
        # Where the architecture says so, whether tokens see only the past; else each call says it
        self.causal: bool | None = None
        # Whether the layer's rotation is heeded, if it is told: an adapter may be of a time when it was not known
        self.rotates = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its start; those that were loaded from a checkpoint are left alone."""
        for part in (self.predictor, self.span, self.refiner, self.global_temperature):
            if part is not None:
                part.reset_parameters()
        readout = (self.readout_weight, self.readout_global_weight)
        for parameter in (self.feedback_matrix, *readout):
            if parameter is not None:
                init.zeros_(parameter)
        if self.mix is not None:
            init.constant_(self.mix, math.log(self.config.mix_start / (1 - self.config.mix_start)))
            init.constant_(self.log_gain, math.log(self.config.gain_start))
        if self.join is not None:
            rows, columns = self.join.shape[-2:]
            init.copy_(self.join, (self.config.local_start * torch.eye(rows, columns)).expand(self.join.shape))
        if self.readout_bias is not None:
            start = torch.zeros(self.readout_bias.shape)
            start[:, 0] = self.config.readout_bias
            init.copy_(self.readout_bias, start)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, global_output: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The layer's output (B, T, H, Dv): `attend`, whose arguments it takes, joined with `global_output`."""
        query, key, value = in_one_precision(query, key, value)
        with without_autocast(query):
            local = self.attend(query, key, value, global_output, *args, **kwargs)
            weight, local = self.join.to(global_output.dtype), local.to(global_output.dtype)
            if self.config.combine == "per_head":
                of_local, of_global = weight.split(self.value_head_dim, dim=1)
                added = local @ of_local + global_output.transpose(1, 2) @ of_global
                return global_output + added.transpose(1, 2)
            local = local.transpose(1, 2)
            both = torch.cat([local.flatten(2), global_output.flatten(2)], dim=-1)
            return global_output + (both @ weight).view_as(global_output)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        global_output: Tensor,
        attention_mask: Tensor | BandMask | None = None,
        *,
        is_causal: bool = True,
        scaling: float | None = None,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
        sliding_window: int | None = None,
        query_offset: int | Tensor = 0,
        layer_feedback: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """The local branch: span from `global_output`, then iterated local attention.

        Args:
            query: (B, H, T, D), after position encoding.
            key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), after the cache.
            global_output: G (B, T, H, Dv).
            attention_mask: what the model gave, (B, 1 or H, T, S), bool or additive, lazy or None.
            query_offset: position among the keys of the first query, see `masks.find_query_offset`.
            is_causal, scaling, softcap, position_bias: as in `focus_attention`.
            sliding_window: the layer's own window, which the local branch respects too.
            layer_feedback: with `feedback_through="layer"`: W_O·W_Q (H, Dv, D), see `layer_feedback`.
            rotation: of the queries, where the layer has rotary positions. Read with `rotate_feedback`; and with
                `global_rotation` below 1, where queries and keys come without a part of it and get it here.

        Returns:
            (B, H, T, Dv).
        """
        config = self.config
        max_span = min(config.max_span, sliding_window or config.max_span)
        length, scaling = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
        if isinstance(query_offset, Tensor):
            key, value, attention_mask, position_bias, query_offset = gather_reach(
                key, value, attention_mask, position_bias, query_offset, length, max_span, is_causal
            )
        slow = rotation is not None and config.global_rotation < 1
        if (config.qk_norm or slow) and is_causal:
            # What is out of reach need not be normalised or rotated for each decoded token
            key, value, attention_mask, position_bias, query_offset = within_reach(
                key, value, attention_mask, position_bias, query_offset, max_span
            )
        if config.qk_norm:
            query, key = (unit(_wide(x)).to(x.dtype) for x in (query, key))
            scaling = query.shape[-1] ** -0.5
        if slow:
            query, key, rotation = rotate_slow_pairs(query, key, query_offset, rotation, config.global_rotation)
        num_keys = key.shape[2]
        valid = own_key_visible(attention_mask, length, num_keys, query_offset, query.device)
        num_visible = count_visible(attention_mask, length, num_keys, query_offset, max_span, is_causal, query.device)

        pooled = pool_global(global_output, attention_mask, config.span_granularity, config.window_size)
        predicted = self.predictor(pooled.flatten(2))
        scale, correction = predicted, None
        if self.refiner is not None:
            # With a frozen predictor, as in LoRA training of the base, the table stays too: it would not be saved
            learns = self.training and self.predictor.weight.requires_grad
            if learns:
                self.refiner.begin(self.predictor.weight)
            own = own_statistics(query, key, value, query_offset, scaling)
            taught = valid if learns else None
            correction = Correction(
                self.refiner, config, predicted, num_visible, own, global_output, taught, is_causal
            )
            scale = correction.scale

        angles, pairs = None, "halves"
        heeded = slow or (rotation is not None and self.rotates and config.rotate_feedback)
        if heeded and config.max_iterations > 1:
            angles, pairs = rotation.values.to(query.device), rotation.pairs
        # How often to look does not depend on where in the text a token is
        asking = query if angles is None or self.readout_weight is None else rotate_back(query, angles, pairs)
        span, temperature = self.span(scale, count_in_span(num_visible, scale * config.max_span, is_causal))
        matrix = self._feedback_matrix(layer_feedback)
        if self.feeds_keys:
            # Keys beside the values, of which F takes the keys; these are rotated already
            value, angles = torch.cat([value, key], dim=-1), None
            matrix = torch.nn.functional.pad(matrix, (0, 0, self.value_head_dim, 0))
        options = {
            "readout_weights": self._readout_weights(asking, global_output),
            "feedback_matrix": matrix,
            "rotation": angles,
            "rotary_pairs": pairs,
            "mix": None if self.mix is None else _wide(self.mix).sigmoid(),
            "gain": None if self.log_gain is None else _wide(self.log_gain).exp(),
            "attention_mask": attention_mask,
            "position_bias": position_bias,
            "is_causal": is_causal,
            "scaling": scaling,
            "softcap": softcap,
            "query_offset": query_offset,
            "max_span": max_span,
            "ramp": config.ramp,
            "max_iterations": config.max_iterations,
            "feedback": config.feedback,
            "anchored": config.anchored,
        }
        local = focus_attention(
            query,
            key,
            value,
            span,
            temperature=temperature,
            stop=config.stop,
            base_threshold=config.base_threshold,
            threshold_scale=config.threshold_scale,
            coverage_threshold=config.coverage_threshold,
            need_statistics=is_observed() or (correction is not None and correction.needs_statistics),
            backend=config.backend,
            **options,
        )
        if self.feeds_keys:
            local = local._replace(output=local.output[..., : self.value_head_dim])
        output = local.output
        if correction is not None:
            output = correction.learn(local, self.span, partial(kept_mass, query, key, value, **options), num_keys)
        if config.span_penalty and self.training and not torch.compiler.is_compiling():
            note_mean_span(scale, valid, self.predictor.weight.requires_grad)
        if is_observed():
            action = None if correction is None else correction.action
            found = (local.entropy, local.coverage, local.iterations)
            # Detached: a checkpointed layer is computed again unobserved, and must save the same tensors
            notify(self, FocusRecord(span.detach().clamp(max=max_span), scale.detach(), *found, action, valid))
        return output

    def _readout_weights(self, query: Tensor, global_output: Tensor) -> Tensor | None:
        if self.readout_weight is None:
            return None
        logits = _wide(torch.einsum("bhtd,hdi->bhti", query, self.readout_weight.to(query.dtype)))
        if self.readout_global_weight is not None:
            weight = self.readout_global_weight.to(global_output.dtype)
            logits = logits + _wide(torch.einsum("bthv,hvi->bhti", global_output, weight))
        return (logits + _wide(self.readout_bias)[:, None]).softmax(dim=-1)

    def _feedback_matrix(self, of_layer: Tensor | None) -> Tensor | None:
        if self.feedback_matrix is None:
            return None
        matrix = _wide(self.feedback_matrix)
        return matrix + (self._identity(matrix) if of_layer is None else of_layer)

    def _identity(self, like: Tensor) -> Tensor:
        return torch.eye(*like.shape[1:], dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def fold_feedback(self, of_layer: Tensor) -> None:
        """Keep F = `of_layer` (H, Dv, D) + what was learned, as with `feedback_through="features"`; settings are not
        changed."""
        if self.feedback_matrix is not None:
            self.feedback_matrix.copy_(_wide(self.feedback_matrix) + of_layer - self._identity(of_layer))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, value_head_dim={self.value_head_dim}"


def _parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if wanted else None


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
