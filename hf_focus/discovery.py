"""The architecture of a model that nobody declared, read from its modules; and what of it cannot be reached."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .architecture import CROSS_ATTENTION, Architecture, declared_architectures, find_architecture
from .errors import UnsupportedArchitectureError, bad_value

# Class names: attention to another sequence or to channels, and attention that is no softmax over keys
_CROSS = re.compile(r"Cross|Merged|Channel|Perceiver|Pooler|PoolingHead")
_RECURRENT = re.compile(
    r"Linear|Lightning|Delta|Mamba|SSM|Conv|Performer|Hyena|RetNet|Rwkv|Fourier|Norm|Channel|GatedAttention"
)
_LOOKS_LIKE_ATTENTION = re.compile(
    r"Attention$|Attn$|Attention(V\d)?$|SdpaAttention$|MultiHeadAttention|MultiheadAttention"
)


@cache
def interface_call(module_class: type[nn.Module]) -> Callable[..., Any] | None:
    """The method by which modules of a class ask transformers' `AttentionInterface` for their attention; None: none.

    It is found by the names that its code uses, so that no source is needed.
    """
    for name in _method_names(module_class):
        method = getattr(module_class, name, None)
        method = inspect.unwrap(method) if callable(method) else None
        code = getattr(method, "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return method
    return None


def _method_names(module_class: type[nn.Module]) -> Iterator[str]:
    # One by one: torch 2.11 compiles the first, and could not compile the list of the others
    yield "forward"
    yield from vars(module_class)


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention that a module's forward falls back to: each modeling file has its own.

    Raises:
        UnsupportedArchitectureError: its file has none.
    """
    method = interface_call(type(module))
    namespace = getattr(method, "__globals__", {})
    for name in getattr(getattr(method, "__code__", None), "co_names", ()):
        if "eager" in name and callable(namespace.get(name)):
            return namespace[name]
    accepted = f"'sdpa': {type(module).__name__} has no eager attention of its own"
    raise UnsupportedArchitectureError(bad_value("attn_implementation", "eager", accepted))


def interface_of(module: nn.Module) -> Any:
    """The registry of attention functions that a module's forward reads: a modeling file may have its own. Where the
    forward does not name it, as under another name, transformers' own."""
    call = interface_call(type(module))
    return ALL_ATTENTION_FUNCTIONS if call is None else call.__globals__["ALL_ATTENTION_FUNCTIONS"]


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The declaration of a model's type, or else what its modules say.

    Raises:
        UnsupportedArchitectureError: it has no self-attention that FocusA can reach; with the reason.
    """
    model_type = _type_of(model)
    declared = find_architecture(model_type)
    if declared is not None:
        return declared
    declarations = declared_architectures()
    # Models within this one, by type: the text model of a multimodal one
    inner = {_type_of(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    parts = [declarations[name] for name in sorted(inner & declarations.keys())]
    parts = [part for part in parts if any(part.of(path, module) for path, module in model.named_modules())]
    covered = {name for part in parts for name in part.attention}
    classes = {
        type(module).__name__
        for path, module in model.named_modules()
        if _is_reached(module) and not re.search(CROSS_ATTENTION, path) and type(module).__name__ not in covered
    }
    if not classes and not parts:
        raise UnsupportedArchitectureError(_why_not(model, model_type))
    return Architecture(model_type, attention=tuple(sorted(classes)), parts=tuple(parts))


def unreached_attention(model: nn.Module, architecture: Architecture) -> list[str]:
    """Class names of what looks like self-attention in a model and is not reached by its architecture, sorted."""
    reached = [path for path, module in model.named_modules() if architecture.of(path, module) is not None]
    return sorted(
        {
            type(module).__name__
            for path, module in model.named_modules()
            if _looks_like_attention(module)
            and not re.search(architecture.exclude, path)
            and not any(f"{site}.".startswith(f"{path}.") or path.startswith(f"{site}.") for site in reached)
        }
    )


def _type_of(model: PreTrainedModel) -> str:
    # A Focus model's type is its base's
    return getattr(type(model.config), "base_class", type(model.config)).model_type


def _is_reached(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel) or _CROSS.search(type(module).__name__):
        return False
    return interface_call(type(module)) is not None


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return (
        bool(_LOOKS_LIKE_ATTENTION.search(name))
        and not isinstance(module, PreTrainedModel)
        and not (_CROSS.search(name) or _RECURRENT.search(name))
        and next(module.parameters(), None) is not None
    )


def _why_not(model: PreTrainedModel, model_type: str) -> str:
    found = sorted({type(module).__name__ for module in model.modules() if _looks_like_attention(module)})
    cross = sorted({type(m).__name__ for m in model.modules() if interface_call(type(m)) is not None} - set(found))
    cross = [name for name in cross if not name.startswith(type(model).__name__) and _CROSS.search(name)]
    if found:
        reason = (
            f"the forward of its attention ({', '.join(found)}) does not call transformers' AttentionInterface. If it"
            f' computes softmax(q·kᵀ)·v, hf_focus.register_architecture("{model_type}", attention="{found[0]}",'
            " routed=True) declares it"
        )
    elif cross:
        reason = f"it only attends to other sequences ({', '.join(cross)}), and FocusA goes on self-attention"
    else:
        reason = "it has no self-attention: none of its modules is known as one by its code or its name"
    return f"`model` got {type(model).__name__} of model type {model_type!r}, which FocusA cannot patch: {reason}."
