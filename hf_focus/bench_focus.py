"""FocusA's local attention as contenders: by number of attentions, span, and whether queries stop."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import focus_attention
from .bench_cases import Call, Case, band_facts, band_keys, leaf, make_inputs
from .bench_contenders import OTHERS, Contender
from .bench_trained import PER_TOKEN
from .cells import query_block

RAMP = 32
ONE_PASS = "focus 1"
# Spans: the whole window, or what an untrained predictor gives
FULL, HALF = "", ", half span"
_COMPUTES = "iterated softmax over the span"


def contenders(iterations: Sequence[int]) -> list[Contender]:
    """Everything of the op suite: others first, then FocusA with each number of attentions; 1 is always among them."""
    counts = sorted({1, *iterations})
    many = [count for count in counts if count > 1]
    ours = [
        Contender(
            f"focus {count}{name}",
            _untrained(count, share),
            ("softmax over the span" if count == 1 else _COMPUTES) + ("" if share == 1 else ", half of it"),
            decodes=not name,
        )
        for name, share in ((FULL, 1.0), (HALF, 0.5))
        for count in counts
    ]
    if 4 in many:
        ours.append(Contender("focus 4, statistics", _untrained(4, 1.0, True), f"{_COMPUTES}; entropy and coverage"))
    ours += [
        Contender(f"focus {count}, trained{name}", _trained(count, predicted), f"{_COMPUTES}, until the output rests")
        for name, predicted in ((FULL, False), (", predicted span", True))
        for count in many
        if count >= 4
    ]
    return [*OTHERS, *ours]


def _settings(case: Case, count: int) -> dict[str, object]:
    return {
        "max_span": case.span,
        "ramp": RAMP,
        "max_iterations": count,
        "backend": case.backend,
        "need_statistics": False,
        "query_offset": case.length - case.num_queries,
    }


def _untrained(count: int, share: float, statistics: bool = False) -> Callable[[Case], Call]:
    """Random inputs, nobody stops. One attention over the whole window has gradients for q, k and v, as its rivals
    have; every other one for all that a layer with FocusA learns."""

    def build(case: Case) -> Call:
        query, key, value = make_inputs(case)
        shape = (case.batch, case.heads, case.num_queries)
        noise = torch.Generator().manual_seed(1)
        wide = torch.promote_types(case.dtype, torch.float32)
        inputs = {"query": query, "key": key, "value": value}
        span = torch.full(shape, share * case.span)
        if count == 1 and share == 1:
            inputs["span"] = span.to(case.device)
        else:
            inputs["span"] = leaf(span, case, wide)
            inputs["temperature"] = leaf(torch.ones(shape), case, wide)
        if count > 1:
            matrix = torch.eye(case.head_dim) + 0.05 * torch.randn(
                case.heads, case.head_dim, case.head_dim, generator=noise
            )
            weights = torch.randn(*shape, count, generator=noise).softmax(-1)
            inputs["readout_weights"] = leaf(weights, case, wide)
            inputs["feedback_matrix"] = leaf(matrix, case, wide)
            inputs["mix"] = leaf(torch.full((case.heads,), 0.5), case, wide)
            inputs["gain"] = leaf(torch.ones(case.heads), case, wide)
        settings = _settings(case, count) | {"need_statistics": statistics}
        return _focus(case, inputs, {**settings, "base_threshold": 0.0, "threshold_scale": 0.0})

    return build


def _trained(count: int, predicted: bool) -> Callable[[Case], Call]:
    """Inputs of a trained layer, stop rule at its defaults; spans as predicted, or the whole window."""

    def build(case: Case) -> Call:
        kept = torch.load(dict(case.trained)[count])
        inputs = {"rotation": kept.pop("rotation")[:, :, : case.length].to(case.device)}
        for name, tensor in kept.items():
            if name in PER_TOKEN:
                tensor = tensor[:, :, : case.length].expand(case.batch, *(-1,) * (tensor.ndim - 1))
            if name == "span" and not predicted:
                tensor = torch.full_like(tensor, case.span)
            products = name in ("query", "key", "value")
            dtype = case.dtype if products else torch.promote_types(case.dtype, tensor.dtype)
            # The function takes its inverse
            name, tensor = ("temperature", tensor.reciprocal()) if name == "sharpness" else (name, tensor)
            inputs[name] = leaf(tensor, case, dtype)
        return _focus(case, inputs, _settings(case, count))

    return build


def _focus(case: Case, inputs: dict[str, Tensor], settings: dict[str, object]) -> Call:
    def facts() -> dict[str, float]:
        with torch.no_grad():
            iterations = focus_attention(**inputs, **settings).iterations
        reach = (inputs["span"].detach() + RAMP).ceil().clamp_max(case.span)
        return band_facts(
            case, band_keys(case, reach), iterations, query_block("cpu", reach.amax().item(), case.batch * case.heads)
        )

    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return Call(lambda: focus_attention(**inputs, **settings).output, leaves, case.training, facts)
