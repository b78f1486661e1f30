"""The properties of a patched model, each a check of a `Case` that raises where the property does not hold."""

import copy
import inspect
import re
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from coverage_case import (
    SETTINGS,
    TOLERANCE,
    Case,
    NotHere,
    attention_calls,
    branches,
    close,
    difference,
    logits,
    run,
    short,
)
from coverage_models import LENGTH, tokens
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedModel

from hf_focus import apply_focus, record_focus, remove_focus
from hf_focus.architecture import Architecture
from hf_focus.discovery import interface_call
from hf_focus.masks import is_visible


def check_whole(case: Case) -> None:
    """Every branch acts, and every self-attention that ran has one."""
    with record_focus(case.model) as records, attention_calls() as calls:
        run(case.model, case.inputs)
    silent = [path for path, found in records.layers.items() if not found]
    architecture = Architecture.from_dict(case.report.model_type, case.model.config.focus_architecture)
    paths = {id(module): path for path, module in case.model.named_modules()}
    left = {
        type(module).__name__
        for module in calls
        if not hasattr(module, "focus")
        and not re.search(architecture.exclude, paths.get(id(module), ""))
        and not re.search("Cross|Perceiver|Pool|Merged|Channel", type(module).__name__)
        and type(module).__name__ not in architecture.attention
        and not any(type(module).__name__ in part.attention for part in architecture.parts)
    }
    if left:
        raise AssertionError(f"{', '.join(sorted(left))} attends without FocusA")
    if len(silent) == len(records):
        raise AssertionError("no branch acts")
    case.report.reason = f"{len(silent)} of {len(records)} layers had no input: {silent[0]}" if silent else ""


def check_identity(case: Case) -> None:
    before = run(case.plain, case.inputs)
    if difference(before, run(case.plain, case.inputs)) > 0:
        raise NotHere("the base model is not deterministic")
    close(run(case.model, case.inputs), before, "outputs")
    if difference(run(case.acting(), case.inputs), before) == 0:
        raise AssertionError("a trained branch changes nothing")


def check_scores(case: Case) -> None:
    """The branch is given what the model's own attention reads: attention computed from that is the model's."""
    gaps: list[float] = []

    def compare(branch: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value, output, mask = (*args, None)[:5]
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.mT * (kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5)
        if kwargs.get("softcap"):
            scores = (scores / kwargs["softcap"]).tanh() * kwargs["softcap"]
        for added in (kwargs.get("position_bias"), mask):
            if added is not None and added.dtype != torch.bool:
                scores = scores + added
        visible = torch.ones_like(scores, dtype=torch.bool) if mask is None else is_visible(mask).expand_as(scores)
        if mask is None and kwargs["is_causal"] and query.shape[2] > 1:
            visible = visible.tril()
        seen = visible.any(-1, keepdim=True)
        expected = (scores.masked_fill(~visible, -1e30).softmax(-1) * seen) @ value
        size = max(1.0, output.abs().max().item())
        gaps.append(((expected.transpose(1, 2) - output) * seen.any(1)[..., None]).abs().max().item() / size)

    case.model.eval()
    handles = [branch.register_forward_pre_hook(compare, with_kwargs=True) for branch in branches(case.model).values()]
    try:
        run(case.model, case.inputs)
    finally:
        for handle in handles:
            handle.remove()
    methods = [interface_call(type(module)) for module in case.model.modules() if hasattr(module, "focus")]
    if any("sinks" in (*m.__code__.co_varnames, *m.__code__.co_names) for m in methods if m is not None):
        raise NotHere("attention sinks, which the local branch leaves out")
    assert max(gaps) <= TOLERANCE, f"what the branch is given makes another attention, by {max(gaps):.1e}"


def check_removal(case: Case) -> None:
    model = copy.deepcopy(case.plain)
    kinds = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    config, state = (type(model.config), model.config.to_dict()), set(model.state_dict())
    implementations = {p: m.config._attn_implementation for p, m in model.named_modules() if hasattr(m, "config")}
    remove_focus(apply_focus(model, SETTINGS))
    now = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    assert kinds == now, "modules are not what they were"
    assert config == (type(model.config), model.config.to_dict()), "the config is not what it was"
    assert state == set(model.state_dict()), "the state dict is not what it was"
    assert implementations == {
        p: m.config._attn_implementation for p, m in model.named_modules() if hasattr(m, "config")
    }
    assert difference(run(model, case.inputs), run(case.plain, case.inputs)) == 0, "outputs differ"


def check_saving(case: Case) -> None:
    model = case.acting()
    before = run(model, case.inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is type(model.config), "AutoConfig makes another config"
    state = model.state_dict()
    changed = [k for k, v in loaded.state_dict().items() if k not in state or not torch.equal(v, state[k])]
    if changed and not all(".focus." not in key for key in changed):
        raise AssertionError(f"loaded otherwise: {changed[0]}")
    if changed and not _plain_saves(case):
        raise NotHere("the base model is not saved whole either")
    assert not changed, f"loaded otherwise: {changed[0]}"
    close(run(loaded, case.inputs), before, "outputs", 1e-6)


def _plain_saves(case: Case) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        case.plain.save_pretrained(folder)
        loaded = type(case.plain).from_pretrained(folder).state_dict()
    return all(torch.equal(value, loaded[key]) for key, value in case.plain.state_dict().items() if key in loaded)


def _leak(model: PreTrainedModel, case: Case) -> float:
    position = LENGTH // 2
    changed = case.inputs[case.ids].clone()
    changed[:, position] = (changed[:, position] - 2) % 70 + 3
    before, after = logits(model, **case.inputs), logits(model, **{**case.inputs, case.ids: changed})
    if before.ndim != 3 or before.shape[1] != LENGTH:
        raise NotHere("no logits a token")
    return (before[:, :position] - after[:, :position]).abs().max().item()


def check_causality(case: Case) -> None:
    leak = _leak(case.acting(), case)
    # Experts compute their tokens together: another token among them may round otherwise
    if leak > 1e-6 and _leak(case.plain, case) > 1e-6:
        raise NotHere("the base model sees the future too")
    assert leak <= 1e-6, f"what comes later changes what is before by {leak:.1e}"


def _hold_for_base(case: Case, gap: Callable[[PreTrainedModel], float], what: str) -> None:
    """Go on only where the base model runs on text alone, and `what` changes nothing in it."""
    try:
        base = gap(case.plain)
    except NotHere:
        raise
    except Exception as error:
        raise NotHere(f"the base model does not run on text alone ({short(error)[:80]})") from error
    if base > TOLERANCE:
        raise NotHere(f"{what} changes the base model too")


def check_padding(case: Case) -> None:
    if case.ids != "input_ids":
        raise NotHere("decoder's prompt is one token")
    ids = tokens(1, 12)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def gap(model: PreTrainedModel) -> float:
        alone = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        more = (
            {"position_ids": positions}
            if "position_ids" in model.forward.__code__.co_varnames or _takes_positions(model)
            else {}
        )
        padded = logits(model, input_ids=torch.nn.functional.pad(ids, (5, 0)), attention_mask=mask, **more)
        return (padded[:, 5:] - alone).abs().max().item() / max(1.0, alone.abs().max().item())

    _hold_for_base(case, gap, "padding")
    found = gap(case.acting())
    assert found <= TOLERANCE, f"padding on the left changes logits by {found:.1e}"


def check_place(case: Case) -> None:
    """The same text further on, where every layer's rotation is known or the model has no positions."""
    if case.ids != "input_ids" or not _takes_positions(case.plain):
        raise NotHere("it takes no positions")
    ids = tokens(1, 12)

    def gap(model: PreTrainedModel) -> float:
        mask = torch.ones_like(ids)
        near, far = (
            logits(model, input_ids=ids, attention_mask=mask, position_ids=torch.arange(12)[None] + start)
            for start in (0, 40)
        )
        return (near - far).abs().max().item() / max(1.0, near.abs().max().item())

    _hold_for_base(case, gap, "the place")
    found = gap(case.acting())
    rotary = case.model.config.focus_architecture["rotary"]
    known = all(type(module).__name__ in rotary for module in case.model.modules() if hasattr(module, "focus"))
    if found > TOLERANCE and not known:
        raise NotHere("a rotation that is not known")
    assert found <= TOLERANCE, f"the place in the text changes logits by {found:.1e}"


def _takes_positions(model: PreTrainedModel) -> bool:
    takes = inspect.signature(model.forward).parameters
    return "position_ids" in takes or ("kwargs" in takes and not hasattr(model.config, "n_positions"))


def check_cache(case: Case) -> None:
    ids, inputs = case.ids, case.inputs

    def gap(model: PreTrainedModel) -> float:
        whole = logits(model, **inputs)
        if whole.ndim != 3 or whole.shape[1] != LENGTH:
            raise NotHere("no logits a token")
        cache, steps = None, []
        for start, stop in ((0, 9), (9, 12), *((i, i + 1) for i in range(12, LENGTH))):
            with torch.no_grad():
                torch.manual_seed(5)
                part = inputs[ids][:, start:stop]
                first = inputs if start == 0 or ids != "input_ids" else {}
                more = (
                    {"position_ids": torch.arange(start, stop)[None].expand(len(part), -1)}
                    if _takes_positions(model) and ids == "input_ids"
                    else {}
                )
                output = model(**{**first, ids: part}, past_key_values=cache, use_cache=True, **more)
            cache = output.past_key_values
            if cache is None:
                raise NotHere("no cache")
            steps.append(output.logits)
        return (torch.cat(steps, dim=1) - whole).abs().max().item() / max(1.0, whole.abs().max().item())

    try:
        found = gap(case.acting())
    except NotHere:
        raise
    except Exception:
        try:
            gap(case.plain)
        except Exception as error:
            raise NotHere(f"the base model does not run with a cache either ({short(error)[:80]})") from error
        raise
    if found > TOLERANCE and gap(case.plain) > TOLERANCE:
        raise NotHere("cached differs from uncached in the base model too")
    if found > TOLERANCE:
        # Rounding, if it is that, is gone in float64
        found = gap(case.acting().double())
    assert found <= TOLERANCE, f"cached logits differ by {found:.1e}"


def check_gradients(case: Case) -> None:
    model = case.acting()
    torch.manual_seed(5)
    with record_focus(model) as records:
        output = model(**case.inputs)
    values = [v for k, v in output.items() if "past_key_values" not in k] if hasattr(output, "items") else output
    parts = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.requires_grad]
    if not parts:
        raise NotHere("no output has a gradient")
    sum(x.double().square().mean() for x in parts).backward()
    ran = tuple(f"{path}.focus." for path, calls in records.layers.items() if calls)
    ours = {n: p for n, p in model.named_parameters() if n.startswith(ran)}
    upstream = {n for n, p in model.named_parameters() if p.grad is None and ".focus." not in f".{n}"}
    for name, parameter in ours.items():
        site = name.partition(".focus.")[0]
        if records[site][0].entropy.min() < 1e-4:
            # All the weight on one key: another query would find the same
            continue
        if parameter.grad is None and any(other.startswith(f"{site}.") for other in upstream):
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        if parameter.grad.abs().max() == 0:
            before = run(model, case.inputs)
            parameter.data.add_(1.0)
            # Where all values that a layer sees are alike, no weight makes a difference
            assert difference(run(model, case.inputs), before) < 1e-4, f"the gradient of {name} is zero"
            parameter.data.sub_(1.0)


CHECKS: dict[str, Callable[[Case], None]] = {
    "whole": check_whole,
    "identity": check_identity,
    "scores": check_scores,
    "removal": check_removal,
    "saving": check_saving,
    "causality": check_causality,
    "padding": check_padding,
    "place": check_place,
    "cache": check_cache,
    "gradients": check_gradients,
}
