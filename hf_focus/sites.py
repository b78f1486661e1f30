"""The places in a model that FocusA goes to: found, checked against the settings, and filled."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from .architecture import HEAD_DIM, NUM_HEADS, VALUE_HEAD_DIM, WIDTH, Architecture
from .branch import FocusBranch
from .configuration import FocusConfig
from .errors import FocusConfigError, NoMatchingLayerError, UnsupportedArchitectureError, bad_value
from .projections import find_projections
from .rotation_hooks import RotationHook, find_rotation, hand_on_rotation
from .routing import change_class, routed_class, unrouted_class


@dataclass(frozen=True)
class Site:
    """One self-attention module: its path, layer number within its stack, and sizes.

    rotary_pairs, rotation_hook: see `find_rotation`.
    """

    path: str
    module: nn.Module
    layer: int
    num_heads: int
    head_dim: int
    value_head_dim: int
    is_causal: bool
    declared_causal: bool | None = None
    route: "RoutedScores | None" = None
    rotary_pairs: str | None = None
    rotation_hook: RotationHook | None = None


@dataclass(frozen=True)
class RoutedScores:
    """How attention that does not call the interface makes its scores: see `Architecture`, with what it names read."""

    is_causal: bool
    scaling: float | None
    bias: bool


def find_sites(model: nn.Module, architecture: Architecture) -> list[Site]:
    """Every self-attention module of `model`.

    Raises:
        UnsupportedArchitectureError: there is none, or its sizes cannot be told.
    """
    found = [
        (path, module, declaration)
        for path, module in model.named_modules()
        if (declaration := architecture.of(path, module)) is not None
    ]
    if not found:
        classes = " or ".join(
            (*architecture.attention, *(name for part in architecture.parts for name in part.attention))
        )
        raise UnsupportedArchitectureError(
            f"`{architecture.model_type}`: no module of {type(model).__name__} is of the declared attention class"
            f" {classes}; register_architecture with the class the model uses."
        )
    config = getattr(model, "config", None)
    return [
        _site(path, module, number, declaration, config) for number, (path, module, declaration) in enumerate(found)
    ]


def _site(path: str, module: nn.Module, number: int, architecture: Architecture, model_config: object) -> Site:
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation") and not architecture.routed:
        accepted = "an attention module that reads its attention function's name from its `config`"
        raise UnsupportedArchitectureError(bad_value(path, type(module).__name__, accepted))
    # The module first: its own sizes win over a config shared by layers of different sizes
    holders = (module, config, model_config) if architecture.routed else (module, config)
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    num_heads = _size(holders, path, "num_heads", architecture.num_heads, NUM_HEADS)
    width = _first(holders, WIDTH)
    default = width // num_heads if width is not None else None
    head_dim = _size(holders, path, "head_dim", architecture.head_dim, HEAD_DIM, default)
    causal = architecture.causal
    if causal is None:
        causal = is_causal_module(module)
    elif isinstance(causal, str):
        causal = any(bool(getattr(holder, causal, False)) for holder in holders)
    scaling = architecture.scaling
    if isinstance(scaling, str):
        scaling = getattr(module, scaling, None)
        if not isinstance(scaling, (int, float)):
            accepted = f"the name of a number on `{path}` ({type(module).__name__})"
            raise UnsupportedArchitectureError(bad_value("scaling", architecture.scaling, accepted))
    return Site(
        path=path,
        module=module,
        layer=numbers[0] if numbers else number,
        num_heads=num_heads,
        head_dim=head_dim,
        value_head_dim=_size(holders, path, "value_head_dim", architecture.value_head_dim, VALUE_HEAD_DIM, head_dim),
        is_causal=causal,
        declared_causal=None if architecture.causal is None else causal,
        route=RoutedScores(causal, scaling, architecture.bias) if architecture.routed else None,
    )


def is_causal_module(module: nn.Module) -> bool:
    """Whether an attention module says that it sees only the past."""
    return bool(getattr(module, "is_causal", False) or getattr(module, "is_decoder", False))


def _first(holders: tuple[object, ...], names: tuple[str, ...]) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _size(
    holders: tuple[object, ...],
    path: str,
    what: str,
    declared: str | None,
    usual: tuple[str, ...],
    default: int | None = None,
) -> int:
    value = _first(holders, (declared,) if declared else usual)
    if value is not None:
        return value
    if default is not None and not declared:
        return default
    raise UnsupportedArchitectureError(
        bad_value(what, declared, f"the name of an int on `{path}` ({type(holders[0]).__name__}) or its config")
    )


def plan(model: nn.Module, config: FocusConfig, architecture: Architecture) -> list[Site]:
    """The sites that `config` asks for. Changes nothing.

    Raises:
        NoMatchingLayerError: `config.layers` or `config.modules` names what does not exist.
        FocusConfigError: settings that this model cannot have.
        UnsupportedArchitectureError: see `find_sites`; or layers that rotate in another way than `architecture` says.
    """
    existing = find_sites(model, architecture)
    sites = _within(existing, config.modules, model)
    if config.layers is not None:
        layers = sorted({site.layer for site in sites})
        missing = [layer for layer in config.layers if layer not in layers]
        if missing:
            accepted = f"layers of {type(model).__name__}: {', '.join(map(str, layers))}; {missing} do not exist"
            raise NoMatchingLayerError(bad_value("layers", config.layers, accepted))
        sites = [site for site in sites if site.layer in config.layers]
    causal = [site.path for site in sites if site.is_causal]
    if causal and config.span_granularity != "token":
        accepted = f"'token', since `{causal[0]}` is causal and a mean would show it the future"
        raise FocusConfigError(bad_value("span_granularity", config.span_granularity, accepted))
    if config.feedback_through == "layer" and config.max_iterations > 1:
        for site in sites:
            find_projections(site.module, site.num_heads, site.head_dim, site.value_head_dim)
    routed = [site for site in sites if site.route is not None]
    if routed and config.global_exponent_start is not None:
        accepted = f"None: `{routed[0].path}` ({type(routed[0].module).__name__}) is not on transformers' interface"
        raise FocusConfigError(bad_value("global_exponent_start", config.global_exponent_start, accepted))
    if not _reads_rotation(config):
        return sites
    sites = [_with_rotation(site, architecture) for site in sites]
    if config.global_rotation < 1:
        _check_shared_keys(sites, existing, config)
        sites = [_rotating_less(site, config.global_rotation) for site in sites]
    return sites


def _reads_rotation(config: FocusConfig) -> bool:
    return config.global_rotation < 1 or (config.rotate_feedback and config.max_iterations > 1)


def _rotating_less(site: Site, share: float) -> Site:
    """The site of a layer that rotates only a share of its pairs. One among others that does not rotate stays."""
    if site.rotary_pairs is None:
        accepted = (
            f"1.0: `{site.path}` ({type(site.module).__name__}) has no rotary positions that are known here; `modules`"
            " chooses those parts of a model that have"
        )
        raise FocusConfigError(bad_value("global_rotation", share, accepted))
    hook = site.rotation_hook
    return replace(site, rotation_hook=None if hook is None else replace(hook, share=share))


def _check_shared_keys(sites: list[Site], existing: list[Site], config: FocusConfig) -> None:
    """Refuse layers that would read keys which a layer with another rotation keeps."""
    chosen, configs = {site.path for site in sites}, {id(getattr(site.module, "config", None)) for site in sites}
    for site in existing:
        of_site = getattr(site.module, "config", None)
        if getattr(of_site, "num_kv_shared_layers", 0) and id(of_site) in configs and site.path not in chosen:
            accepted = f"1.0, or all layers of a model whose layers share keys: `{site.path}` is left out"
            raise FocusConfigError(bad_value("global_rotation", config.global_rotation, accepted))


def _with_rotation(site: Site, architecture: Architecture) -> Site:
    module_class = unrouted_class(type(site.module))
    name, (pairs, hook) = module_class.__name__, find_rotation(site.module, module_class)
    # A part goes before the whole
    declared = architecture.of(site.path, site.module).rotary
    declared = architecture.rotary if declared is None else declared
    if declared is not None and name not in declared:
        return site
    if declared is not None and declared[name] != pairs:
        found = "no entry" if pairs is None else repr(pairs)
        accepted = (
            f"{found}, which is how {module_class.__module__}.{name} is known to rotate its queries with transformers"
            f" {transformers.__version__}; a model that was saved otherwise needs the release it was saved with"
        )
        raise UnsupportedArchitectureError(bad_value(f"rotary[{name!r}]", declared[name], accepted))
    return replace(site, rotary_pairs=pairs, rotation_hook=hook)


def with_rotary(architecture: Architecture, sites: list[Site], config: FocusConfig) -> Architecture:
    """`architecture` with what was found of its rotary positions, to be saved, where `config` makes use of it."""
    if architecture.rotary is not None or not _reads_rotation(config):
        return architecture
    found = {unrouted_class(type(site.module)).__name__: site.rotary_pairs for site in sites}
    return replace(architecture, rotary={name: pairs for name, pairs in sorted(found.items()) if pairs is not None})


def _within(sites: list[Site], pattern: str | None, model: nn.Module) -> list[Site]:
    found = sites if pattern is None else [site for site in sites if re.search(pattern, site.path)]
    if not found:
        # One path of each kind shows what there is to match
        kinds = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\g<1>0", site.path) for site in sites)
        accepted = f"a pattern found in the paths of {type(model).__name__}'s self-attention: {', '.join(kinds)}"
        raise NoMatchingLayerError(bad_value("modules", pattern, accepted))
    return found


def build_branches(sites: list[Site], config: FocusConfig, dtype: torch.dtype) -> dict[str, FocusBranch]:
    """A new branch for each site by path, on its device, in `dtype` and in the mode (train or eval) of its module."""
    branches = {}
    for site in sites:
        with torch.device(_device(site.module)):
            branch = FocusBranch(config, site.num_heads, site.head_dim, site.value_head_dim)
        branch.causal = site.declared_causal
        branch.rotates = site.rotation_hook is not None
        branches[site.path] = branch.to(dtype).train(site.module.training)
    return branches


def _device(module: nn.Module) -> torch.device:
    first: Any = next(module.parameters(), None)
    return first.device if first is not None else torch.get_default_device()


def install(sites: list[Site], branches: dict[str, FocusBranch]) -> None:
    """Put the branches on their modules."""
    for site in sites:
        site.module.add_module("focus", branches[site.path])
        hand_on_rotation(site.module, site.rotation_hook)
        if site.route is not None:
            branches[site.path].route = site.route
            change_class(site.module, routed_class(type(site.module)))
