"""What the checks of coverage share: a model plain and patched, its inputs, and the running of both."""

import copy
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from hf_focus import FocusConfig
from hf_focus.branch import FocusBranch
from hf_focus.errors import UnsupportedArchitectureError

# No query stops early: a stopped one has no gradient for what it did not use
SETTINGS = FocusConfig(max_span=7, ramp=3, max_iterations=3, base_threshold=0.0, threshold_scale=0.0, refiner=True)
DECODER_TASKS = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT")
TOLERANCE = 1e-5


class NotHere(Exception):
    """A property that the base model does not have either, or that is about something this model has not."""


@dataclass
class Report:
    """What was found of one model type. `properties`: name -> "yes", "no: why", or "-: why it does not apply"."""

    model_type: str
    task: str = ""
    model: str = ""
    status: str = ""
    reason: str = ""
    heads: str = ""
    sites: int = 0
    seconds: float = 0.0
    properties: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Random values for every weight of FocusA, as training would give: the branch acts."""
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".focus." in f".{name}":
            parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * std)
    return model


def run(model: PreTrainedModel, inputs: dict[str, Tensor], **more: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output. What a model draws at random, it draws the same each time."""
    torch.manual_seed(5)
    with torch.no_grad():
        output = model(**inputs, **more)
    values = (
        [value for key, value in output.items() if "past_key_values" not in key]
        if hasattr(output, "items")
        else output
    )
    found = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise NotHere("no tensor in its output")
    return found


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return run(model, inputs)[0] if not hasattr(model, "lm_head") else _logits(model, inputs)


def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    if [x.shape for x in one] != [x.shape for x in other]:
        return float("inf")
    gaps = [
        ((a - b).abs().nan_to_num(0.0).max().item() if a.numel() else 0.0) for a, b in zip(one, other, strict=True)
    ]
    return max(gaps)


def close(one: list[Tensor], other: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    gap, size = difference(one, other), max(1.0, *(x.abs().nan_to_num(0.0).max().item() for x in other if x.numel()))
    if gap > tolerance * size:
        raise AssertionError(f"{what} differ by {gap:.1e}")


@contextmanager
def attention_calls():
    """The modules that call sdpa while the `with` runs, in a list."""
    calls: list[nn.Module] = []
    original = AttentionInterface._global_mapping["sdpa"]

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return original(module, *args, **kwargs)

    AttentionInterface._global_mapping["sdpa"] = noting
    try:
        yield calls
    finally:
        AttentionInterface._global_mapping["sdpa"] = original


def branches(model: nn.Module) -> dict[str, FocusBranch]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FocusBranch)}


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = isinstance(error, (NotHere, AssertionError, UnsupportedArchitectureError, LookupError, RuntimeError))
    return (text if named and text else f"{type(error).__name__}: {text}")[:300]


@dataclass
class Case:
    """plain: the unpatched model; model: a patched copy, untrained; inputs: what both take."""

    report: Report
    plain: PreTrainedModel
    model: PreTrainedModel
    inputs: dict[str, Tensor]

    def acting(self) -> PreTrainedModel:
        return randomize(copy.deepcopy(self.model))

    @property
    def ids(self) -> str:
        if "decoder_input_ids" in self.inputs:
            return "decoder_input_ids"
        if self.report.task in DECODER_TASKS and "input_ids" in self.inputs and self._is_causal():
            return "input_ids"
        raise NotHere("no decoder")

    def _is_causal(self) -> bool:
        return any(
            branch.route.is_causal
            if hasattr(branch, "route")
            else getattr(self.model.get_submodule(path.removesuffix(".focus")), "is_causal", False)
            for path, branch in branches(self.model).items()
        )
