"""`FocusConfig`: every setting of FocusA, validated when it is made, and saved inside the model's config.json."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import FocusConfigError, bad_value
from .rules import (
    BELOW_ONE,
    BETWEEN_ZERO_AND_ONE,
    BOOL,
    NON_NEGATIVE,
    Rule,
    choice,
    int_from,
    is_int,
    number,
    optional,
)

_FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_LAYERS = Rule(
    "a non-empty list of different ints >= 0",
    lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(is_int(layer) and layer >= 0 for layer in value)
        and len(set(value)) == len(value)
    ),
)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


_RULES = {
    "max_span": int_from(1),
    "max_iterations": int_from(1),
    "max_dist": optional(int_from(1)),
    "sink_tokens": int_from(0),
    "layers": optional(_LAYERS),
    "modules": optional(Rule("a regular expression", _is_pattern)),
    "ramp": int_from(1),
    "per_head_span": BOOL,
    "span_granularity": choice("token", "window", "sequence"),
    "window_size": int_from(1),
    "initial_span": BETWEEN_ZERO_AND_ONE,
    "span_penalty": NON_NEGATIVE,
    "qk_norm": BOOL,
    "temperature": choice("learned", "seed"),
    "exponent_start": number("a number", lambda value: True),
    "sharpen": BOOL,
    "temp_scale": NON_NEGATIVE,
    "feedback": choice("normalized", "additive"),
    "feedback_through": choice("features", "layer", "keys"),
    "rotate_feedback": BOOL,
    "global_rotation": _FRACTION,
    "global_exponent_start": optional(number("a number", lambda value: True)),
    "anchored": BOOL,
    "mix_start": BETWEEN_ZERO_AND_ONE,
    "gain_start": number("a number above 0", lambda value: value > 0),
    "readout": choice("mixture", "last"),
    "readout_bias": number("a number", lambda value: True),
    "readout_from": choice("query", "both"),
    "local_start": number("a number", lambda value: True),
    "combine": choice("per_head", "projection"),
    "stop": choice("absolute", "relative"),
    "base_threshold": NON_NEGATIVE,
    "threshold_scale": BELOW_ONE,
    "refiner": BOOL,
    "reward": choice("seed", "mass", "loss"),
    "span_cost": NON_NEGATIVE,
    "num_actions": int_from(2),
    "alpha": _FRACTION,
    "gamma": BELOW_ONE,
    "epsilon": _FRACTION,
    "entropy_weight": NON_NEGATIVE,
    "coverage_threshold": _FRACTION,
    "global_attn_implementation": optional(choice("sdpa", "eager")),
    "backend": choice("auto", "reference", "blocked", "triton"),
}


# What settings were before they could be chosen, where what was saved says nothing of them
EARLIER = {"rotate_feedback": False}


@dataclass(frozen=True)
class FocusConfig:
    """Settings of FocusA for one model. Immutable; validated on construction.

    Args:
        max_span: keys that the local branch can reach, in tokens, the query's own included.
        max_iterations: most attention passes that one query makes over its span.
        max_dist: how far the *global* branch looks, in tokens; None: as far as the model does. With it set, attention
            costs O(tokens × max_dist), and `generate` of a decoder runs in constant memory: its cache keeps the sinks
            and the last max(max_dist, max_span) tokens (`FocusCache`). A cache that you pass, or choose by a
            `cache_implementation` other than `"dynamic"`, and one that the model makes when it is called directly,
            keeps what it always keeps, with the same results; so does every cache where `layers` leaves layers
            unpatched.
        sink_tokens: first tokens of a sequence that stay visible to the global branch under `max_dist` (StreamingLLM,
            2309.17453). A layer with a sliding window of its own has none: it looks min(window, max_dist) far.
        layers: numbers of the layers to patch; None patches all. In models of stages (Swin) a number is a stage's;
            `modules` chooses single blocks.
        modules: regular expression: only self-attention whose path in the model it finds is patched. It chooses the
            towers of a multimodal model: `"vision"`, `"^model.language_model"`.
        ramp: width of the soft edge of the span, in tokens (Adaptive Span, 1905.07799).
        per_head_span: one span a head, or one shared by all heads (the seed).
        span_granularity: what the predictor pools over: `"token"` (nothing), `"window"`, or `"sequence"` (the seed).
            Only `"token"` is causal.
        window_size: width of the `"window"` pooling, in tokens (the seed's `win_size`).
        initial_span: share of `max_span` that an untrained predictor gives.
        span_penalty: weight of the mean span (share of `max_span`) added to the model's loss.
        qk_norm: normalise the queries and keys of the local branch to root mean square 1 (2010.04245, 2302.05442), so
            that no score exceeds √head_dim; the model's own scaling does not count there. What is fed back into a
            query then cannot make attention ever sharper: a model trained from scratch learns far more steadily.
        temperature: `"learned"` (a head learns how it depends on the span and on the number of keys: scalable
            softmax, 2501.19399) or `"seed"` (fixed, see `sharpen`).
        exponent_start: with `temperature="learned"`: how the temperature depends on the number n of keys in the span
            before training: 1/τ ∝ (1 + log n)^`exponent_start`, and τ = 1 at n = 16. At 1 logits grow with n as those
            of scalable softmax do, so that attention is spread less where there are more keys than in training.
            It says little while spans are short: n counts the keys at full weight.
        sharpen: with `temperature="seed"`: τ = 1 + c(1 − s) if True, 0.5 + c·s if False, c = `temp_scale`.
        temp_scale: c above.
        feedback: how the output enters the next query: `"normalized"` (mixed in, norm kept) or
            `"additive"` (the seed).
        feedback_through: where F, which makes a query of an output, starts from: `"features"` (the identity: a head's
            output is taken for a query) or `"layer"` (the layer's own output and query projections, W_O·W_Q of each
            head: what the query projection makes of what the head writes, without norms, gates and position encodings
            on the way). Either way a difference to it is learned. `"keys"` feeds back the mean of the keys that a head
            attended to and not of the values (modern Hopfield networks, 2008.02217): to compare with, it looks again
            for what it has found. With `"layer"` F moves with the projections, and
            `fold_feedback(model)` makes it a fixed matrix: decode after that, since W_O·W_Q costs each call more than
            a token does. Needs separate projections on the attention module.
        rotate_feedback: in layers with rotary positions, rotate what is fed back into a query as the query is, and
            read the read-out's weights from the query before it is rotated: the local branch then knows distances
            between tokens and not their places in the text, as the model's own attention does. Without it, F gives
            queries that mean something else in each place. Layers whose rotation is not known have none, see `rotary`.
        global_rotation: in layers with rotary positions, the share of the pairs of features that rotate in the global
            branch, those that turn fastest (p-RoPE, 2410.06205). The slow ones take angles in long texts that none had
            in training: without them the global branch finds what is farther away than any training text was long. At
            0 it has no positions at all (2305.19466). The local branch has all of them: it rotates the slow pairs by
            places among the keys, with base 10,000, whatever `position_ids` and YaRN's scale say. For models that
            are trained from scratch: the outputs of a pretrained one do not stay the same below 1. What is fed back is
            always rotated then, see `rotate_feedback`.
        global_exponent_start: where the exponent starts by which the logits of the *global* branch grow with the
            number n of keys that a query may see: a head's products of queries and keys are multiplied by
            ((1 + log n) / (1 + log 16))^e, its own e learned (scalable softmax, 2501.19399); position biases, sinks
            and caps are not. None: no such factor. At 0 a pretrained model stays as it was; at 1, for models that are
            trained from scratch, attention is spread less among more keys than in training. Not with `max_dist`, which
            bounds n, nor for attention off transformers' interface.
        anchored: mix with the first query instead of the last one, so that the iteration has a fixed point.
        mix_start: with `"normalized"`: share of the fed-back output in the next query before training.
        gain_start: with `"normalized"`: size of the next queries, as a multiple of the first, before training. Below 1
            attention is softer then, which leaves the feedback a gradient where the first attention is sharp.
        readout: `"mixture"` (a learned average over the iterations) or `"last"` (the seed).
        readout_bias: with `"mixture"`: how far, in logits, training starts on the first iterate; 0 is an
            equal mixture.
        readout_from: with `"mixture"`: what its weights depend on: the `"query"`, or `"both"` query and global output,
            so that a token elsewhere can say how many iterations this one takes.
        local_start: how much of the local output is added to the global one at the start: 0 leaves a pretrained model
            as it was; a model trained from scratch may start with 1.
        combine: join of local and global output within a head (`"per_head"`) or across heads
            (`"projection"`, the seed).
        stop: the stop rule reads the change of the output in the values' units (`"absolute"`, the seed) or as a
            share of its size (`"relative"`).
        base_threshold: a query stops when its change δ < base_threshold + threshold_scale·δ.
        threshold_scale: see `base_threshold`.
        refiner: whether the Q-table corrects the predicted span. It only shortens: spans that begin short, as by
            default, it leaves as they are.
        reward: what the refiner, if there is one, learns from: `"mass"` (the share of the local attention that the
            corrected span keeps, − `span_cost`·span as a share of `max_span`: spans become as short as they can
            without losing what is attended to; a query counts by the gradient of its output), `"seed"` (coverage −
            `entropy_weight`·entropy of the local attention weights), or `"loss"` (by how much, to first order, the
            correction lowered the loss of the model).
        span_cost: with `reward="mass"`: share of the attention that the refiner gives up for a span shorter by
            `max_span`.
        num_actions: corrections the refiner chooses from: factors 0, 1/(A−1), …, 1.
        alpha: learning rate of the Q-table.
        gamma: discount of the Q-table, with the seed's reward; with the others a correction has its whole effect at
            once.
        epsilon: share of random actions while training; none with `reward="mass"`, which compares all corrections of a
            query with each other.
        entropy_weight: weight of the entropy in the seed's reward.
        coverage_threshold: a key counts as covered when its weight is above this.
        global_attn_implementation: attention of the global branch; None keeps the model's own choice.
        backend: how the local branch is computed, see `focus_attention`.

    Raises:
        FocusConfigError: a value of the wrong type or out of range.
    """

    max_span: int = 256
    max_iterations: int = 4
    max_dist: int | None = None
    sink_tokens: int = 4
    layers: list[int] | None = None
    modules: str | None = None
    ramp: int = 2
    per_head_span: bool = True
    span_granularity: str = "token"
    window_size: int = 256
    initial_span: float = 0.01
    span_penalty: float = 0.0
    qk_norm: bool = False
    temperature: str = "learned"
    exponent_start: float = 0.0
    sharpen: bool = True
    temp_scale: float = 0.01
    feedback: str = "normalized"
    feedback_through: str = "features"
    rotate_feedback: bool = True
    global_rotation: float = 1.0
    global_exponent_start: float | None = None
    anchored: bool = False
    mix_start: float = 0.5
    gain_start: float = 1.0
    readout: str = "mixture"
    readout_bias: float = 0.0
    readout_from: str = "query"
    local_start: float = 0.0
    combine: str = "per_head"
    stop: str = "absolute"
    base_threshold: float = 1e-4
    threshold_scale: float = 0.1
    refiner: bool = False
    reward: str = "mass"
    span_cost: float = 0.01
    num_actions: int = 10
    alpha: float = 0.1
    gamma: float = 0.9
    epsilon: float = 0.1
    entropy_weight: float = 0.1
    coverage_threshold: float = 0.01
    global_attn_implementation: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.layers, (list, tuple, range)):
            object.__setattr__(self, "layers", list(self.layers))
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not rule.holds(value):
                raise FocusConfigError(bad_value(name, value, rule.accepted))
        if self.global_exponent_start is not None and self.max_dist is not None:
            accepted = "None with max_dist: the number of keys that the global branch sees does not grow there"
            raise FocusConfigError(bad_value("global_exponent_start", self.global_exponent_start, accepted))
        if self.feedback_through == "keys" and self.global_rotation < 1:
            # F would see keys that are rotated by their places among those that are left of a text
            accepted = "1.0 with feedback_through='keys'"
            raise FocusConfigError(bad_value("global_rotation", self.global_rotation, accepted))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FocusConfig":
        """The inverse of `to_dict`.

        Raises:
            FocusConfigError: `values` is no dict, or holds a name that is no setting, or a value that is not accepted.
        """
        if not isinstance(values, dict):
            raise FocusConfigError(bad_value("focus_config", values, "a FocusConfig or a dict of its settings"))
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise FocusConfigError(bad_value("focus_config", name, f"the settings {', '.join(known)}"))
        return cls(**values)

    @classmethod
    def build(cls, config: "FocusConfig | dict[str, Any] | None" = None, **overrides: Any) -> "FocusConfig":
        """A config from another one, a dict or nothing, with some settings replaced.

        Raises:
            FocusConfigError: as the constructor and `from_dict`.
        """
        # By its dict and not by isinstance: loaded as remote code, this class exists twice
        values = config.to_dict() if hasattr(config, "to_dict") else config if config is not None else {}
        if not isinstance(values, dict):
            raise FocusConfigError(bad_value("config", config, "a FocusConfig, a dict of its settings, or None"))
        return cls.from_dict({**values, **overrides})
