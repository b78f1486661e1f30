"""The refiner: a small Q-table that corrects the predicted span (the seed's `Refiner`), vectorised, in buffers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, is_available, is_initialized
from transformers import initialization as init

from .errors import FocusConfigError, bad_value
from .observers import in_backward

NUM_FEATURES = 4
NUM_BINS = 10
# Bins of a feature normalised to mean 0 and variance 1: eight of this width, one of them around 0, and two open ones
BIN_WIDTH = 0.5
# What varies less is one bin: a span before the predictor has learned, which rounding alone tells apart
LEAST_DEVIATION = 1e-3
# Running statistics average all that was seen until this weight, then forget slowly
LEAST_MOMENTUM = 0.01
# Gradient and named tensors -> arguments of `Refiner.update`
Rule = Callable[..., dict[str, Tensor]]


class Refiner(nn.Module):
    """Q-learning over 10 bins of 4 statistics (10⁴ states) and A span corrections.

    The table moves once an optimizer step, of however many backward passes and processes: each backward pass (`learn`)
    adds its sums, over all processes, to `pending`, and the first forward pass of the next step (`begin`) takes them
    in. So all forward passes of a step, and their recomputation under gradient checkpointing, see the same table.
    `eval()` and `state_dict()` take them in too: nothing is pending in a model that is used or saved. Every process
    must make the same number of backward passes, as under DDP.

    Buffers, always in float32: `table` (states, actions), `mean` and `variance` (4,) of the statistics, and
    `num_updates` (1,), int64, are saved with the model; `pending` (2 · states · actions + 9,) and `fingerprint` (1,)
    are not.

    Args:
        states: rows of the table; 10 ** 4 for four statistics in ten bins.
        actions: A, corrections to choose from: factor a/(A − 1).
        alpha: learning rate.
        gamma: discount.
        epsilon: share of random actions in training mode.
    """

    def __init__(
        self,
        states: int = NUM_BINS**NUM_FEATURES,
        actions: int = 10,
        alpha: float = 0.1,
        gamma: float = 0.9,
        epsilon: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, low in (("states", states, 1), ("actions", actions, 2)):
            if not isinstance(value, int) or value < low:
                raise FocusConfigError(bad_value(name, value, f"an int >= {low}"))
        self.alpha = alpha
        self.gamma = gamma
        self.epsilon = epsilon
        self.register_buffer("table", torch.empty(states, actions, dtype=torch.float32))
        self.register_buffer("mean", torch.empty(NUM_FEATURES, dtype=torch.float32))
        self.register_buffer("variance", torch.empty(NUM_FEATURES, dtype=torch.float32))
        self.register_buffer("num_updates", torch.empty(1, dtype=torch.long))
        # Errors and counts of all pairs; sums, sums of squares and number of the statistics
        size = 2 * states * actions + 2 * NUM_FEATURES + 1
        # No checkpoint has these: who fills an empty model (`init_empty_weights`) from one would leave them on "meta"
        device = "cpu" if self.table.is_meta else None
        self.register_buffer("pending", torch.empty(size, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("fingerprint", torch.empty(1, dtype=torch.float32, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, buffer in self.named_buffers():
            init.constant_(buffer, 1 if name == "variance" else 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Refiner":
        # `model.to(bfloat16)` would round every small step of the table away: follow the device, not the dtype
        return super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device), recurse)

    def forward(self, features: Tensor, explore: bool | None = None) -> tuple[Tensor, Tensor]:
        """Features (..., 4) -> states and actions (...), int64."""
        state = self.discretize(features)
        return state, self.choose_action(state, explore)

    def discretize(self, features: Tensor) -> Tensor:
        """Features (..., 4) -> state numbers (...) int64, by their place in the running statistics."""
        normal = (features.float() - self.mean) / self.variance.sqrt().clamp_min(LEAST_DEVIATION)
        # Arithmetic, since a table of edges would be copied to the device at every call
        bins = (normal / BIN_WIDTH + (NUM_BINS + 1) / 2).floor().clamp(0, NUM_BINS - 1).long()
        powers = NUM_BINS ** torch.arange(NUM_FEATURES, device=bins.device)
        return (bins * powers).sum(dim=-1) % self.table.shape[0]

    def choose_action(self, state: Tensor, explore: bool | None = None) -> Tensor:
        """Actions (...) int64: the best of the table, of equals the last (no correction); when exploring (default: in
        training mode) a random one with probability epsilon."""
        values = self.table[state]
        best = values.shape[-1] - 1 - values.flip(-1).argmax(dim=-1)
        if not (self.training if explore is None else explore) or self.epsilon == 0:
            return best
        at_random = torch.rand(state.shape, device=state.device) < self.epsilon
        return torch.where(at_random, torch.randint_like(best, values.shape[-1]), best)

    def action_to_span_scale(self, action: Tensor) -> Tensor:
        """Action a -> factor a/(A − 1) in [0, 1], float32."""
        return action.float() / (self.table.shape[1] - 1)

    @torch.no_grad()
    def begin(self, weight: nn.Parameter) -> None:
        """To call before a training forward pass reads: takes in what the last optimizer step left, if that is over.

        It is over when `weight` has no gradient (any more), or when its values have changed, which tells steps apart
        where gradients are zeroed in place or after the forward pass. Where they never exist, as in sharded training,
        each backward pass is a step. Nothing is read on the host.

        Args:
            weight: a trained parameter whose gradient every backward pass through `learn` reaches.
        """
        if in_backward():
            # Recomputing: the forward pass saw the table as it is now
            return
        fingerprint = weight.detach().float().sum().view(1)
        self.finish_step(None if weight.grad is None else fingerprint != self.fingerprint)
        self.fingerprint.copy_(fingerprint)

    @torch.no_grad()
    def finish_step(self, over: Tensor | None = None) -> None:
        """Q[s, a] += alpha · mean error, of the errors pending for each pair; the statistics move likewise.

        Args:
            over: (1,) bool, False: nothing is taken in, and all stays pending; None: True.
        """
        if self.table.is_meta:
            # While a checkpoint is loaded there is nothing to take in
            return
        sums = self.pending if over is None else torch.where(over, self.pending, 0)
        errors, counts = sums[: 2 * self.table.numel()].view(2, *self.table.shape)
        total, squares = sums[-2 * NUM_FEATURES - 1 : -1].view(2, NUM_FEATURES)
        self.table.add_(self.alpha * errors / torch.where(counts > 0, counts, 1))
        self._update_statistics(total, squares, sums[-1])
        # A step that saw nothing but padding is none
        self.num_updates.add_(counts.sum() > 0)
        self.pending.copy_(torch.zeros_like(sums) if over is None else torch.where(over, 0, self.pending))

    @torch.no_grad()
    def update(
        self,
        state: Tensor,
        action: Tensor,
        reward: Tensor,
        next_state: Tensor | None = None,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """One temporal-difference step, Q[s, a] += alpha · mean(r + gamma·max Q[s′] − Q[s, a]) over each (s, a) pair
        and all processes.

        Args:
            state: (...) int64.
            action, reward: (...) int64 and float; or (..., N), several actions that were tried in each state.
            next_state: (...) int64. Without it nothing follows: the error is r − Q[s, a].
            features: (..., 4) that the states were made from; moves the running statistics. Without, they stay.
            valid: (...) bool: states to learn from; without, all. Or their weights in the mean, >= 0.
        """
        self._collect(self._sum(state, action, reward, next_state, features, valid))
        self.finish_step()

    def _sum(
        self,
        state: Tensor,
        action: Tensor,
        reward: Tensor,
        next_state: Tensor | None = None,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """What one backward pass adds to `pending`."""
        weight = torch.ones_like(state, dtype=torch.float32) if valid is None else valid.float()
        if features is not None:
            # NaN · 0 is NaN
            weight = weight * features.isfinite().all(dim=-1)
        of_state = weight
        if reward.ndim > state.ndim:
            state, weight = state[..., None], weight[..., None]
        error = reward.float() - self.table[state, action]
        if next_state is not None:
            error = error + self.gamma * self.table[next_state].amax(dim=-1)
        # An overflow elsewhere in the model must not stay in the table for good
        usable = error.isfinite()
        weight = weight * usable
        error = torch.where(weight > 0, error * weight, 0)
        pair = (state * self.table.shape[1] + action).flatten()
        size = self.table.numel()
        sums = torch.zeros_like(self.pending)
        sums[:size].index_add_(0, pair, error.flatten())
        sums[size : 2 * size].index_add_(0, pair, weight.flatten())
        if features is not None:
            seen = (of_state > 0) & (usable if usable.ndim == of_state.ndim else usable.any(dim=-1))
            rows = torch.where(seen[..., None], features.float(), 0).reshape(-1, NUM_FEATURES)
            sums[2 * size : -1] = torch.cat([rows.sum(0), rows.square().sum(0)])
            sums[-1] = seen.sum()
        return sums

    def _collect(self, sums: Tensor) -> None:
        if is_available() and is_initialized():
            # Summed here and not once a step, so that `pending` is the same in the process that saves
            sums = sums.clone()
            all_reduce(sums)
        self.pending.add_(sums)

    def _update_statistics(self, total: Tensor, squares: Tensor, count: Tensor) -> None:
        mean = total / count.clamp_min(1)
        variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
        momentum = (self.num_updates + 1).to(mean.dtype).reciprocal().clamp_min(LEAST_MOMENTUM) * (count > 0)
        drift = mean - self.mean
        self.variance.lerp_(variance, momentum).add_(momentum * (1 - momentum) * drift.square())
        self.mean.lerp_(mean, momentum)

    def learn(self, x: Tensor, rule: Rule | None = None, **entries: Tensor) -> Tensor:
        """`x` unchanged; its backward pass adds to `pending` what `entries`, the arguments of `update`, teach.

        Args:
            rule: makes the arguments of `update` from the gradient of `x` and `entries`, for a reward that is not
                known before.
        """
        if not self.training or not torch.is_grad_enabled() or not x.requires_grad:
            return x
        return _LearnOnBackward.apply(x, self, rule, list(entries), *(entry.detach() for entry in entries.values()))

    def train(self, mode: bool = True) -> "Refiner":
        if not mode:
            self.finish_step()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.finish_step()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What is pending belongs to the table that is replaced
        self.pending.zero_()
        super()._load_from_state_dict(*args, **kwargs)


class _LearnOnBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, refiner: Refiner, rule: Rule | None, names: list[str], *entries: Tensor
    ) -> Tensor:
        ctx.refiner, ctx.rule, ctx.names = refiner, rule, names
        ctx.save_for_backward(*entries)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        entries = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        with torch.no_grad():
            if ctx.rule is not None:
                entries = ctx.rule(grad, **entries)
            ctx.refiner._collect(ctx.refiner._sum(**entries))
        return (grad, *(None for _ in range(3 + len(ctx.names))))
