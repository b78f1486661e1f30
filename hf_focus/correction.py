"""The refiner's part in one call of a layer: it corrects the predicted spans, and learns from what came of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .configuration import FocusConfig
from .kept_mass import sampled_queries
from .problem import FocusOutput
from .refiner import Refiner
from .rewards import saved_loss, weighed
from .span import AdaptiveSpan, count_in_span

# Size of a query's own value, and scaled score of its own key: (B, H, T) each, float32
Own = tuple[Tensor, Tensor]


class Correction:
    """What the refiner makes of the predicted spans of some queries.

    With the reward `"loss"` the backward pass of `scale` teaches; with the others that of what `learn` returns.

    Args:
        refiner: before a lesson, `Refiner.begin` is to be called.
        config: of the branch; `reward` says what is learned from.
        predicted: share of the longest span, (B, H or 1, T).
        num_visible: keys within reach, (B or 1, H or 1, T).
        own: see `own_statistics`.
        global_output: (B, T, H, Dv).
        valid: (B or 1, T) bool, tokens that it learns from; None: from none.
        is_causal: whether a span reaches to one side.

    Attributes:
        scale: the corrected share, in [0, 1], shape of `predicted`.
        action: the corrections, int64, likewise.
    """

    def __init__(
        self,
        refiner: Refiner,
        config: FocusConfig,
        predicted: Tensor,
        num_visible: Tensor,
        own: Own,
        global_output: Tensor,
        valid: Tensor | None,
        is_causal: bool,
    ) -> None:
        self.refiner, self.config, self.predicted, self.own = refiner, config, predicted, own
        self.num_visible, self.is_causal = num_visible, is_causal
        # That is learned from; None: nothing is
        self.reward = None if valid is None else config.reward
        with torch.no_grad():
            features = _statistics(predicted, num_visible, global_output.transpose(1, 2), own)
            # Where every correction is weighed, none needs to be tried
            state, self.action = refiner(features, explore=self.reward in ("loss", "seed"))
            factor = refiner.action_to_span_scale(self.action)
        self.scale = (predicted * factor).clamp(0, 1)
        if valid is not None:
            self.lesson = {"state": state, "features": features, "valid": valid[:, None].expand(state.shape)}
        if self.reward == "loss":
            lesson = {"predicted": predicted, "action": self.action, **self.lesson}
            self.scale = refiner.learn(self.scale, saved_loss, scale=self.scale, **lesson)

    @property
    def needs_statistics(self) -> bool:
        """Whether `learn` reads entropy and coverage."""
        return self.reward == "seed"

    def learn(
        self, local: FocusOutput, adaptive_span: AdaptiveSpan, kept_by: Callable[..., Tensor], num_keys: int
    ) -> Tensor:
        """The output of the local attention, unchanged; with `"seed"` and `"mass"` its backward pass teaches.

        Args:
            local: what came of the corrected spans.
            adaptive_span: of the branch.
            kept_by: `kept_mass.kept_mass` of the same attention.
            num_keys: S, the keys that it had.
        """
        if self.reward == "seed":
            # Not decorated: on a plain object torch.compile cannot follow a method that is
            with torch.no_grad():
                lesson = self._quality(local)
            return self.refiner.learn(local.output, action=self.action, **lesson)
        # Where no backward pass will follow, as in the first pass of reentrant checkpointing, it would be thrown away
        if self.reward == "mass" and local.output.requires_grad:
            rows = sampled_queries(local.output.shape[2], num_keys)
            lesson = {name: x[:, :, rows] for name, x in self.lesson.items()}
            with torch.no_grad():
                lesson |= self._compare(adaptive_span, partial(kept_by, rows=rows), rows)
            return self.refiner.learn(local.output, partial(weighed, rows=rows), **lesson)
        return local.output

    def _quality(self, local: FocusOutput) -> dict[str, Tensor]:
        """The whole lesson of the seed's reward: the coverage of the span, less its entropy; and the state that the
        output leads to."""
        quality = local.coverage - self.config.entropy_weight * local.entropy
        reward = quality.mean(dim=1, keepdim=True) if self.action.shape[1] == 1 else quality
        after = _statistics(self.scale, self._in_span(self.scale, self.num_visible), local.output, self.own)
        return {**self.lesson, "reward": reward, "next_state": self.refiner.discretize(after)}

    def _compare(self, adaptive_span: AdaptiveSpan, kept_by: Callable[..., Tensor], rows: slice) -> dict[str, Tensor]:
        """Of a lesson: every action, (A,), and the reward of each for the N queries `rows`, (B, H or 1, N, A)."""
        predicted = self.predicted[:, :, rows]
        span, temperature = adaptive_span(predicted, self._in_span(predicted, self.num_visible[..., rows]))
        action = torch.arange(self.refiner.table.shape[1], device=predicted.device)
        scales = predicted[..., None] * self.refiner.action_to_span_scale(action)
        kept = kept_by(span, scales * self.config.max_span, temperature)
        if predicted.shape[1] == 1:
            kept = kept.mean(dim=1, keepdim=True)
        return {"action": action, "reward": kept - self.config.span_cost * scales}

    def _in_span(self, scale: Tensor, num_visible: Tensor) -> Tensor:
        return count_in_span(num_visible, scale * self.config.max_span, self.is_causal)


@torch.no_grad()
def own_statistics(query: Tensor, key: Tensor, value: Tensor, query_offset: int, scaling: float) -> Own:
    """How large each query's own value is, and how well it matches its own key.

    Args:
        query, key, value: (B, H, T, D), (B, Hkv, S, D) and (B, Hkv, S, Dv).
        query_offset: place among the keys of the first query.
        scaling: of the scores.
    """
    here = slice(query_offset, query_offset + query.shape[2])
    groups = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (key.shape[1], groups)).float()
    match = (grouped * key[:, :, None, here].float()).sum(dim=-1).flatten(1, 2) * scaling
    return value[:, :, here].float().norm(dim=-1).repeat_interleave(groups, dim=1), match


def _statistics(scale: Tensor, num_keys: Tensor, output: Tensor, own: Own) -> Tensor:
    """The refiner's four statistics, (B, H or 1, T, 4): span, log of the keys, how far the output (B, H, T, Dv) shrank
    against the query's own value (a diffuse average is short), match of the query with its own key."""
    value_size, match = own
    shrunk = (output.float().norm(dim=-1).clamp_min(1e-12) / value_size.clamp_min(1e-12)).log()
    features = [scale.float(), num_keys.float().log(), shrunk, match]
    if scale.shape[1] == 1:
        features = [x.mean(dim=1, keepdim=True) for x in features]
    return torch.stack(torch.broadcast_tensors(*features), dim=-1)
