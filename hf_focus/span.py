"""How far a query looks: the predictor of its span, and the temperatures of both branches."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import initialization as init

from .errors import FocusConfigError, bad_value

# Keys at which an untrained temperature that depends on their number is 1
NEUTRAL_KEYS = 16
_LOG_NEUTRAL = math.log1p(math.log(NEUTRAL_KEYS))


class Predictor(nn.Module):
    """p = sigmoid(W·x + b) from the global branch's output (the seed's `Predictor`).

    W starts at zero, so that an untrained predictor gives the same span everywhere; W still gets a gradient.

    Args:
        dims: features of the global output, all heads together.
        outputs: spans predicted: one a head, or one in all.
        initial: p before training, strictly between 0 and 1.
    """

    def __init__(self, dims: int, outputs: int = 1, initial: float = 0.5) -> None:
        super().__init__()
        if not 0 < initial < 1:
            raise FocusConfigError(bad_value("initial", initial, "a number strictly between 0 and 1"))
        self.initial = initial
        # No nn.Linear, which PEFT, quantization and offloading would take hold of one by one
        self.weight = nn.Parameter(torch.empty(outputs, dims))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, math.log(self.initial / (1 - self.initial)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, dims) -> p (B, outputs, T) in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return logits.sigmoid().transpose(1, 2)


class AdaptiveSpan(nn.Module):
    """The span in tokens, and the temperature that goes with it (the seed's `AdaptiveSpan`).

    `"seed"`: τ = 1 + c(1 − s) if `sharpen`, else 0.5 + c·s. `"learned"`: a head's own
    log(1/τ) = a + b·s + e·log(1 + log n), n the keys in the span; e = 1 is scalable softmax (2501.19399); the
    start is b = 0, e = `exponent`, and a such that τ = 1 at n = `NEUTRAL_KEYS`.

    Args:
        num_heads: H.
        max_span: span in tokens at s = 1.
        temperature: `"learned"` or `"seed"`.
        sharpen: see above.
        temp_scale: c above.
        exponent: with `"learned"`: e before training.
    """

    def __init__(
        self,
        num_heads: int,
        max_span: int,
        temperature: str = "learned",
        sharpen: bool = True,
        temp_scale: float = 0.01,
        exponent: float = 0.0,
    ) -> None:
        super().__init__()
        if temperature not in ("learned", "seed"):
            raise FocusConfigError(bad_value("temperature", temperature, "'learned' or 'seed'"))
        self.max_span = max_span
        self.sharpen = sharpen
        self.temp_scale = temp_scale
        self.exponent = exponent
        self.coefficients = nn.Parameter(torch.empty(3, num_heads)) if temperature == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.coefficients is not None:
            start = torch.tensor([-self.exponent * _LOG_NEUTRAL, 0.0, self.exponent])
            init.copy_(self.coefficients, start[:, None].expand(self.coefficients.shape))

    def forward(self, scale: Tensor, num_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Span and temperature of each query.

        Args:
            scale: s in [0, 1], (B, H or 1, T).
            num_keys: n >= 1, broadcastable to (B, H, T).

        Returns:
            z in tokens, shape of `scale`, and τ (B, H or 1, T).
        """
        span = scale * self.max_span
        if self.coefficients is None:
            temperature = 1 + self.temp_scale * (1 - scale) if self.sharpen else 0.5 + self.temp_scale * scale
            return span, temperature
        constant, slope, exponent = self.coefficients.to(scale.dtype)[:, :, None]
        return span, (-(constant + slope * scale + exponent * _log_of(num_keys, scale.dtype))).exp()


class GlobalTemperature(nn.Module):
    """Makes the queries of the global branch longer where they see more keys: their products with keys are multiplied
    by ((1 + log n) / (1 + log `NEUTRAL_KEYS`))^e, with a head's own e (scalable softmax, 2501.19399).

    Args:
        num_heads: H.
        start: e before training; 0 changes nothing.
    """

    def __init__(self, num_heads: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.exponent = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.exponent, self.start)

    def forward(self, query: Tensor, num_keys: Tensor) -> Tensor:
        """Queries (B, H, T, D) that see `num_keys` keys, (B or 1, H or 1, T), at least 1 -> as long as these ask."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        longer = (self.exponent.to(dtype)[:, None] * (_log_of(num_keys, dtype) - _LOG_NEUTRAL)).exp()
        return (query.to(dtype) * longer[..., None]).to(query.dtype)


def _log_of(num_keys: Tensor, dtype: torch.dtype) -> Tensor:
    """log(1 + log n). No gradient through n: as a count it has none."""
    return num_keys.to(dtype).log().log1p()


def count_in_span(num_visible: Tensor, span: Tensor, is_causal: bool) -> Tensor:
    """Keys at full weight, at least 1, of the `num_visible` ones within reach: no gradient."""
    steps = span.detach().floor()
    return torch.minimum(num_visible.to(steps.dtype), 1 + steps * (1 if is_causal else 2))
