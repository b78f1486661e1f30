"""One model type built, patched and checked for every property; see `check_model_type`."""

import copy
import time
import warnings
from collections.abc import Callable

import torch
from coverage_case import SETTINGS, Case, NotHere, Report, branches, run, short
from coverage_models import find_inputs, model_class_of, tiny_config
from coverage_overrides import OVERRIDES
from coverage_properties import CHECKS
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_focus import apply_focus, record_focus
from hf_focus.errors import UnsupportedArchitectureError


def build(model_type: str) -> tuple[str, PreTrainedModel]:
    """The task and a tiny model, in eval mode, of a model type.

    Raises:
        LookupError: no Auto class has a model of its own for it.
    """
    found = model_class_of(model_type)
    if found is None:
        raise LookupError("its Auto classes have models of other configs only")
    task, model_class = found
    torch.manual_seed(0)
    model = model_class(tiny_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type)))
    for parameter in model.parameters():
        # Biases, and scales of layers, that start at zero would hide what they scale
        if parameter.is_floating_point() and not parameter.any():
            parameter.data.normal_(std=0.02)
        if not parameter.isfinite().all():
            parameter.data.normal_(std=0.02)
    return task, model.eval()


def check_model_type(model_type: str, only: set[str] | None = None) -> Report:
    """Build, patch and check one model type. Never raises for what the model does."""
    report, start = Report(model_type), time.perf_counter()
    warnings.filterwarnings("ignore")
    try:
        _check(report, only)
    except UnsupportedArchitectureError as error:
        report.status, report.reason = "refused", short(error)
    except LookupError as error:
        report.status, report.reason = "not built", short(error)
    report.seconds = round(time.perf_counter() - start, 1)
    return report


def _check(report: Report, only: set[str] | None) -> None:
    try:
        report.task, model = build(report.model_type)
    except Exception as error:
        report.status, report.reason = "not built", short(error)
        return
    report.model = type(model).__name__
    plain = copy.deepcopy(model)
    apply_focus(model, SETTINGS)
    found = branches(model)
    report.sites = len(found)
    report.heads = ", ".join(
        dict.fromkeys(
            f"{b.num_heads}×{b.head_dim}" + (f"/{b.value_head_dim}" if b.value_head_dim != b.head_dim else "")
            for b in found.values()
        )
    )

    def reach(inputs: dict[str, Tensor]) -> int:
        with record_focus(model) as records:
            run(model, inputs)
        return 100 * sum(bool(calls) for calls in records.layers.values()) // len(found)

    try:
        inputs = find_inputs(model, reach)
    except RuntimeError as error:
        try:
            find_inputs(plain, lambda inputs: 100 if run(plain, inputs) else 0)
        except RuntimeError:
            report.status, report.reason = "not run", short(error)
        else:
            report.status, report.reason = "failed", f"the patched model alone does not run: {short(error)}"
        return
    report.status = "checked"
    case = Case(report, plain, model, inputs)
    for name, check in CHECKS.items():
        if only is None or name in only:
            report.properties[name] = _outcome(check, case)
    if any("allocate memory" in value for value in report.properties.values()):
        report.status, report.reason, report.properties = "not run", "its smallest model takes too much memory", {}
    if any(value.startswith("no") for value in report.properties.values()):
        report.status = "failed"


def _outcome(check: Callable[["Case"], None], case: "Case") -> str:
    try:
        check(case)
    except NotHere as reason:
        return f"-: {short(reason)}"
    except Exception as error:
        return f"no: {short(error)}"
    return "yes"
