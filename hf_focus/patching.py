"""`apply_focus`, `remove_focus` and `fold_feedback`: FocusA into a live model, out of it again, and ready for use."""

import warnings
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .branch import FocusBranch
from .configuration import FocusConfig
from .discovery import architecture_of, unreached_attention
from .errors import AlreadyPatchedError, FocusConfigError, NotPatchedError, bad_value
from .focus_configs import is_focus, repoint, to_base
from .modeling import FocusMixin, adopt, plan_adoption
from .projections import layer_feedback
from .rotation_hooks import stop_handing_on
from .routing import change_class, unrouted_class
from .sites import build_branches, install, plan, with_rotary


def apply_focus(
    model: PreTrainedModel, config: FocusConfig | dict[str, Any] | None = None, **settings: Any
) -> PreTrainedModel:
    """Replace the self-attention of `model` by FocusA, in place. Its outputs stay the same until it is trained, but
    with `local_start` or `global_exponent_start` other than 0, or `global_rotation` below 1, which are for models that
    are trained from scratch.

    ```python
    apply_focus(model, FocusConfig(max_span=128))
    apply_focus(model, max_span=128, layers=[2, 3])      # the same settings as keywords; some layers only
    ```

    Args:
        model: a model of a supported architecture. Wrap it (PEFT, DDP, compile) after patching.
        config: the settings; None: the defaults.
        settings: settings that replace those of `config`.

    Returns:
        `model` itself, now of class `Focus…`, with a config of class `Focus…Config`.

    Raises:
        AlreadyPatchedError, FocusConfigError, NoMatchingLayerError, UnsupportedArchitectureError: before anything of
            the model is changed.
    """
    if not isinstance(model, PreTrainedModel):
        accepted = "a transformers PreTrainedModel; patch before wrapping it with PEFT, DDP or torch.compile"
        raise FocusConfigError(bad_value("model", type(model).__name__, accepted))
    if _branches(model):
        raise AlreadyPatchedError(
            bad_value("model", type(model).__name__, "a model without FocusA; remove_focus(model) takes it off")
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()) and any(p.is_meta for p in model.parameters()):
        accepted = "a model whose weights are in memory; patch before offloading it"
        raise FocusConfigError(bad_value("model", type(model).__name__, accepted))
    config = FocusConfig.build(config, **settings)
    architecture = architecture_of(model)
    sites = plan(model, config, architecture)
    architecture = with_rotary(architecture, sites, config)
    # Everything that can fail comes before the first change
    adoption = plan_adoption(model, sites, config, architecture)
    branches = build_branches(sites, config, model.dtype)
    install(sites, branches)
    adopt(model, adoption)
    unreached = unreached_attention(model, architecture) if config.modules is None else []
    if unreached:
        warnings.warn(
            f"FocusA does not reach {', '.join(unreached)} of {type(model).base_class.__name__}, which stays as it is:"
            " it computes attention in a way of its own. FocusConfig(modules=…) says which parts are meant.",
            stacklevel=2,
        )
    return model


def remove_focus(model: PreTrainedModel) -> PreTrainedModel:
    """Take FocusA off `model`, in place: the original class, config and attention again. Its weights are dropped.

    Returns:
        `model` itself.

    Raises:
        NotPatchedError: the model carries no FocusA.
    """
    for path in _own_branches(model):
        module = model.get_submodule(path.rpartition(".")[0])
        delattr(module, "focus")
        stop_handing_on(module)
        change_class(module, unrouted_class(type(module)))
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, FocusMixin):
            change_class(module, type(module).base_class)
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig) and is_focus(value):
                to_base(value, configs)
    repoint(model, configs)
    return model


def fold_feedback(model: PreTrainedModel) -> PreTrainedModel:
    """Make F of a model with `feedback_through="layer"` a matrix of its own, in place: the same outputs, to the
    rounding of the weights' dtype, and nothing to compute before each call. For use and before quantization or
    offloading; what is trained on from here trains F alone.

    Returns:
        `model` itself, with `feedback_through="features"`; one that is not `"layer"` is left as it is.

    Raises:
        NotPatchedError: the model carries no FocusA.
        FocusConfigError: before anything is changed: PEFT wraps FocusA, or projections are quantized, sharded or
            offloaded.
    """
    branches = _own_branches(model)
    if model.focus_config.feedback_through != "layer":
        return model
    modules = {path: model.get_submodule(path.rpartition(".")[0]) for path in branches}
    feedback = {path: layer_feedback(modules[path], branch) for path, branch in branches.items()}
    for path, matrix in feedback.items():
        own = branches[path].feedback_matrix
        if matrix is not None and (own.is_meta or type(matrix) is not Tensor or type(own.data) is not Tensor):
            accepted = f"a model whose weights are whole and in memory, and those of `{path}` are not"
            raise FocusConfigError(bad_value("model", type(model).__name__, accepted))
    for path, branch in branches.items():
        if feedback[path] is not None:
            branch.fold_feedback(feedback[path])
        branch.config = replace(branch.config, feedback_through="features")
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig) and is_focus(value):
                value.focus_config = {**value.focus_config, "feedback_through": "features"}
    return model


def _own_branches(model: nn.Module) -> dict[str, FocusBranch]:
    """The branches of a patched model, which nothing wraps."""
    if not isinstance(model, FocusMixin):
        raise NotPatchedError(bad_value("model", type(model).__name__, "a model patched with FocusA"))
    branches = _branches(model)
    for path in branches:
        if path.rpartition(".")[2] != "focus":
            accepted = f"a model that PEFT does not wrap; `{path}` is wrapped, unload the adapter first"
            raise FocusConfigError(bad_value("model", type(model).__name__, accepted))
    return branches


def _branches(model: nn.Module) -> dict[str, FocusBranch]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FocusBranch)}
