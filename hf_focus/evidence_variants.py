"""What the evidence compares: a table of models, all with the same number of parameters, and how each is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .configuration import FocusConfig
from .errors import FocusConfigError, bad_value
from .evidence_attention import install
from .evidence_types import LONG_SPANS, SHORT_SPANS, Task
from .patching import apply_focus

# How far the parameters of two models of a row may differ
TOLERANCE = 0.02


@dataclass(frozen=True)
class Variant:
    """A declaration of a model.

    Args:
        title: for the report.
        focus: settings of FocusA; None: a model without it.
        start: settings that those of the task go before.
        attention: a name in `evidence_attention.ATTENTIONS`, for a model without FocusA.
        more_layers: besides those of the row.
        qk_norm: the model's own attention normalises queries and keys (a Qwen3 and not a Llama).
        last_unrotated: the last layer has no rotary positions (a SmolLM3 and not a Llama).
        rotated: share of the pairs of features that rotate, those that turn fastest (p-RoPE, 2410.06205).
        rounds: how often a token goes through the layers, with the same weights (Universal Transformer, 1807.03819).
        matched: parameters as many as those of `REFERENCE` (the MLP is widened or narrowed). A deeper baseline is
            not: it may have more.
        frozen: ends of names of parameters that keep their start.
        near: how far the global branch looks, as a share of the length of the training examples; None: everywhere.
        focus_rate: learning rate of FocusA's parameters, as a multiple of the row's.
    """

    title: str
    focus: Mapping[str, Any] | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    attention: str | None = None
    more_layers: int = 0
    qk_norm: bool = False
    last_unrotated: bool = False
    rotated: float = 1.0
    rounds: int = 1
    matched: bool = True
    frozen: tuple[str, ...] = ()
    near: float | None = None
    focus_rate: float = 1.0


REFERENCE = "focus"
_STATIC = ("focus.predictor.weight",)
_FIXED = ("focus.predictor.weight", "focus.predictor.bias")
# FocusA in a model that is trained from scratch, and has no function to keep
FROM_SCRATCH = {
    "qk_norm": True,
    "feedback_through": "layer",
    "mix_start": 0.9,
    "gain_start": 0.5,
    "local_start": 1.0,
}
_ONE_PASS = {"max_iterations": 1}
# And logits of the global branch that grow with the keys, for text that is longer than in training
_SHORT_AND_GROWING = {**SHORT_SPANS, "global_exponent_start": 0.5}


def _focus(
    title: str, *, frozen: tuple[str, ...] = (), near: float | None = None, rate: float = 1.0, **settings: Any
) -> Variant:
    return Variant(title, settings, start=FROM_SCRATCH, frozen=frozen, near=near, focus_rate=rate)


VARIANTS: dict[str, Variant] = {
    "focus": _focus("FocusA"),
    # Baselines
    "plain": Variant("full attention"),
    "plain, normalized": Variant("full attention, queries and keys normalised", qk_norm=True),
    "plain, last unrotated": Variant("full attention, the last layer without positions", last_unrotated=True),
    "plain, quarter rotated": Variant("full attention with a quarter of the positions", rotated=0.25),
    "plain +1": Variant("full attention, one more layer", more_layers=1, matched=False),
    "plain +2": Variant("full attention, two more layers", more_layers=2, matched=False),
    "plain, 4 rounds": Variant("full attention, four times through the layer", rounds=4),
    "hybrid": _focus("sliding window + full, no iteration", **_ONE_PASS),
    "adaptive span": Variant("Adaptive Span alone: static learned span a head", attention="spanned"),
    "log-n": Variant("full attention, logits × s·log n (scalable softmax)", attention="scaled"),
    "focus, near": _focus("FocusA, short spans, global branch within an eighth", near=1 / 8, **SHORT_SPANS),
    "focus, near, not rotated": _focus(
        "… spans of up to 32 tokens with soft ends, feedback not rotated",
        near=1 / 8, rotate_feedback=False, **{**LONG_SPANS, "max_span": 32},
    ),
    "focus, short": _focus("FocusA, short spans", **_SHORT_AND_GROWING),
    "hybrid, short": _focus("short sliding windows + full, no iteration", **_SHORT_AND_GROWING, **_ONE_PASS),
    "hybrid, near": _focus("sliding windows alone", near=1 / 8, **SHORT_SPANS, **_ONE_PASS),
    # Of a pretrained model: FocusA starts silent
    "focus, patched": Variant("FocusA, default settings", {}),
    "hybrid, patched": Variant("sliding window + full, no iteration", _ONE_PASS),
    "refiner, patched": Variant("with the refiner", {"refiner": True}),
    "refiner of the seed, patched": Variant("refiner with the seed's reward", {"refiner": True, "reward": "seed"}),
    "static span, patched": Variant("no predictor: static learned span a head", {}, frozen=_STATIC),
    "soft spans, patched": Variant("spans that start at half of the longest, with soft ends", LONG_SPANS),
    "soft spans, refiner, patched": Variant(
        "spans that start at half of the longest, with soft ends, and the refiner", {**LONG_SPANS, "refiner": True}
    ),
    "not rotated, patched": Variant(
        "… the same, feedback not rotated", {**LONG_SPANS, "refiner": True, "rotate_feedback": False}
    ),
    # Ablations
    "1 iteration": _focus("1 iteration", max_iterations=1),
    "2 iterations": _focus("2 iterations", max_iterations=2),
    "4 iterations": _focus("4 iterations", max_iterations=4),
    "10 iterations": _focus("10 iterations", max_iterations=10),
    "soft spans, not rotated": _focus(
        "… spans of up to 64 tokens with soft ends, feedback not rotated",
        rotate_feedback=False, global_rotation=1.0, **LONG_SPANS,
    ),
    "global rotated": _focus("… global branch with all positions", global_rotation=1.0),
    "global still": _focus("… global branch without positions", global_rotation=0.0),
    "not rotated": _focus("feedback not rotated", rotate_feedback=False),
    "not normalized": _focus("feedback not rotated, queries not normalised", qk_norm=False, rotate_feedback=False),
    "through features": _focus("feedback through the features alone", feedback_through="features"),
    "through keys": _focus("the keys fed back, not the values", feedback_through="keys"),
    "additive": _focus("additive feedback", feedback="additive"),
    "of the seed": _focus(
        "additive feedback through the features, read-out last and the seed's reward (the seed)",
        feedback="additive", feedback_through="features", readout="last", refiner=True, reward="seed",
    ),
    "last": _focus("read-out last", readout="last"),
    "refiner": _focus("refiner that learns what its corrections keep", refiner=True),
    "refiner of the seed": _focus("refiner with the seed's reward", refiner=True, reward="seed"),
    "refiner of the loss": _focus(
        "refiner that learns from the loss, trying one correction in a hundred",
        refiner=True, reward="loss", epsilon=0.01,
    ),
    "static span": _focus("no predictor: static learned span a head", frozen=_STATIC),
    "fixed span": _focus("no predictor: fixed longest span", initial_span=0.99, frozen=_FIXED),
    "seed temperature": _focus("temperature of the seed", temperature="seed"),
    "global flat": _focus("… global branch's logits do not grow with the keys", global_exponent_start=None),
    "exponent 0": _focus(
        "… nor do those of the local branch at the start", global_exponent_start=None, exponent_start=0.0
    ),
    "fixed temperature": _focus("temperature fixed at 1", temperature="seed", temp_scale=0.0),
    # What may make it reliable
    "anchored": _focus("queries mixed with the first one, not the last", anchored=True),
    "bias 2": _focus("mixture starts on the first iterate", readout_bias=2.0),
    "relative stop": _focus("relative stop rule", stop="relative"),
    "no stop": _focus("never stops early", base_threshold=0.0, threshold_scale=0.0),
    "focus rate 3": _focus("learning rate of FocusA × 3", rate=3.0),
    "read-out from both": _focus("read-out from query and global output", readout_from="both"),
    "local start 0": _focus("local output silent at the start", local_start=0.0),
    "full start": _focus("next queries start at the full size", gain_start=1.0),
    "even start": _focus("next queries start half as what is fed back, half as the query", mix_start=0.5),
    "long span": _focus("spans start at the longest", initial_span=0.99),
}  # fmt: skip


def find_variant(name: str) -> Variant:
    """A variant by name.

    Raises:
        FocusConfigError: there is none of this name.
    """
    if name not in VARIANTS:
        raise FocusConfigError(bad_value("variant", name, ", ".join(VARIANTS)))
    return VARIANTS[name]


@dataclass(frozen=True)
class Sizes:
    """Of a model: layers, features of a token, heads."""

    layers: int = 1
    width: int = 64
    heads: int = 2


def focus_settings(task: Task, settings: Mapping[str, Any], variant: Variant) -> dict[str, Any] | None:
    """Every setting of FocusA that a variant has on a task; None without FocusA."""
    if variant.focus is None:
        return None
    near = {}
    if variant.near is not None:
        near = {"max_dist": max(1, round(variant.near * task.length(**settings))), "global_exponent_start": None}
    # An encoder's output projection is in another module
    through = {"feedback_through": "features"} if task.encoder else {}
    return FocusConfig.build({**variant.start, **task.focus(**settings), **near, **variant.focus, **through}).to_dict()


def build(
    task: Task, settings: Mapping[str, Any], name: str, sizes: Sizes, seed: int, matched: bool = True
) -> PreTrainedModel:
    """A new model in training mode; the same for the same seed.

    Args:
        settings: of the task's training examples, all of them.
        name: in `VARIANTS`.
        matched: False leaves the MLP as it is, whatever the variant says.
    """
    variant = find_variant(name)
    inner = 2 * sizes.width
    if matched and variant.matched and name != REFERENCE:
        wanted = count(_make(task, settings, VARIANTS[REFERENCE], sizes, inner))
        inner = _matching_inner(task, settings, variant, sizes, inner, wanted)
    torch.manual_seed(seed)
    model = _make(task, settings, variant, sizes, inner)
    _freeze(model, variant)
    return model.train()


def patch(model: PreTrainedModel, task: Task, settings: Mapping[str, Any], name: str) -> None:
    """Make a trained plain model the variant `name`, which is the plain one or one with FocusA.

    Raises:
        FocusConfigError: a variant of another kind.
    """
    variant = find_variant(name)
    focus = focus_settings(task, settings, variant)
    if focus is not None:
        apply_focus(model, focus)
        _freeze(model, variant)
    elif variant.attention or variant.more_layers or variant.rounds > 1:
        raise FocusConfigError(bad_value("variant", name, "plain, or one that a model can be patched to"))


def _freeze(model: nn.Module, variant: Variant) -> None:
    for path, parameter in model.named_parameters():
        if path.endswith(variant.frozen):
            parameter.requires_grad_(False)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _matching_inner(
    task: Task, settings: Mapping[str, Any], variant: Variant, sizes: Sizes, inner: int, wanted: int
) -> int:
    """Width of the MLP at which the variant has `wanted` parameters, ± `TOLERANCE`: the count is linear in it."""
    here, wider = (count(_make(task, settings, variant, sizes, width)) for width in (inner, inner + 1))
    inner = max(1, inner + round((wanted - here) / (wider - here)))
    found = count(_make(task, settings, variant, sizes, inner))
    if abs(found - wanted) > TOLERANCE * wanted:
        raise FocusConfigError(bad_value("variant", variant.title, f"one that {wanted} parameters are enough for"))
    return inner


def _make(task: Task, settings: Mapping[str, Any], variant: Variant, sizes: Sizes, inner: int) -> PreTrainedModel:
    longest = max(task.length(**{**settings, **test}) for test in ({}, *task.tests.values()))
    common = {
        "vocab_size": task.vocabulary(**settings),
        "hidden_size": sizes.width,
        "intermediate_size": inner,
        "num_hidden_layers": sizes.layers + variant.more_layers,
        "num_attention_heads": sizes.heads,
        # 0.02 is for wide models: here it would leave attention flat, and every model long on a plateau
        "initializer_range": sizes.width**-0.5,
        # Rotary positions cost no parameters; learned ones do
        "max_position_embeddings": max(longest, 16),
    }
    if task.encoder:
        model: PreTrainedModel = BertForTokenClassification(
            BertConfig(**common, num_labels=task.settings["num_labels"], hidden_dropout_prob=0.0)
        )
    else:
        if variant.qk_norm:
            heads = {"num_key_value_heads": sizes.heads, "head_dim": sizes.width // sizes.heads}
            model = Qwen3ForCausalLM(Qwen3Config(**common, **heads, tie_word_embeddings=True))
        elif variant.last_unrotated:
            rotated = [1] * (common["num_hidden_layers"] - 1) + [0]
            # As a Llama's, where its defaults are others
            alike = {
                "num_key_value_heads": sizes.heads,
                "rope_parameters": LlamaConfig().rope_parameters,
                **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
            }
            model = SmolLM3ForCausalLM(
                SmolLM3Config(**common, **alike, no_rope_layers=rotated, tie_word_embeddings=True)
            )
        else:
            model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
            frequency = model.model.rotary_emb.inv_freq
            frequency[round(variant.rotated * len(frequency)) :] = 0
        if variant.rounds > 1:
            model.model.layers = nn.ModuleList([*model.model.layers] * variant.rounds)
            model.config.num_hidden_layers = len(model.model.layers)
    if task.symbols > 1:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.sum(dim=-2))
    focus = focus_settings(task, settings, variant)
    if focus is not None:
        apply_focus(model, focus)
    elif variant.attention is not None:
        install(model, variant.attention, 2 ** math.ceil(math.log2(task.length(**settings))))
    return model
