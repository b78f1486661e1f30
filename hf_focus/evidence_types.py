"""What a task of the evidence is: a pure generator of batches with a seed, and how answers are measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from .errors import FocusConfigError, bad_value

IGNORED = -100
# Settings of FocusA where the token before is what a layer needs first: spans begin as a token or less, with hard ends
SHORT_SPANS = {"max_span": 16, "ramp": 2, "initial_span": 0.02}
# And what is looked for beyond them may be farther away than in training
FAR_AND_SHORT = {**SHORT_SPANS, "global_rotation": 0.25}
# Or stand among many more tokens than in training
AMONG_MORE = {"global_exponent_start": 1.0}
# And where a layer has to look far from the first step: they begin as half of the longest
LONG_SPANS = {"max_span": 64, "ramp": 16, "initial_span": 0.5}


@dataclass(frozen=True)
class Batch:
    """Some examples of a task.

    input_ids: (B, T) int64, or (B, T, symbols), see `Task`. labels: (B, T) int64, what is to be answered *at* each
    position, −100 where nothing is asked (not shifted). groups: (B, T) int64, the number that accuracy is reported by
    (steps, distance, depth, …); read only where something is asked.
    """

    input_ids: Tensor
    labels: Tensor
    groups: Tensor

    def to(self, device: str) -> "Batch":
        return Batch(self.input_ids.to(device), self.labels.to(device), self.groups.to(device))


@dataclass(frozen=True)
class Task:
    """A declaration.

    Args:
        name: in tables and files.
        claim: number of the claim that it tests.
        title: one line for the report, with the source of the definition.
        group: what `Batch.groups` count, in words.
        make: (size, generator, **settings) -> `Batch`.
        vocabulary: (**settings) -> number of different tokens.
        length: (**settings) -> tokens of an example.
        settings: the defaults that examples are made with in training.
        tests: name of a test set -> settings that differ there; `"train"`, fresh examples as in training, joins them.
        focus: (**settings) -> settings of FocusA that fit; a variant's own win.
        encoder: see both sides (a BERT that labels tokens) instead of a causal Llama.
        symbols: that one position holds; its embedding is the sum of theirs.
        ordered: whether positions mean anything; if not, models are given none.
        spread: measure on every test set how attention is spread, see `claims.measure_attention`.
        measure: (predictions (B, T), batch) -> further counts by name; summed over batches.
        bytes_per_label: of text; with it the loss is also given in bits per byte.
        cost_on: a test set: costs are measured at its length, those of running with a cache included; None: at that of
            the training examples, without these.
    """

    name: str
    claim: int
    title: str
    group: str
    make: Callable[..., Batch]
    vocabulary: Callable[..., int]
    length: Callable[..., int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    focus: Callable[..., Mapping[str, Any]] = dict
    encoder: bool = False
    symbols: int = 1
    ordered: bool = True
    spread: bool = False
    measure: Callable[[Tensor, Batch], dict[str, float]] | None = None
    bytes_per_label: float | None = None
    cost_on: str | None = None

    def batch(self, size: int, generator: Generator, settings: Mapping[str, Any] | None = None) -> Batch:
        """`size` examples; the same for the same state of `generator`, on every machine."""
        return self.make(size, generator, **{**self.settings, **(settings or {})})

    def with_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults with some replaced.

        Raises:
            FocusConfigError: a name that is no setting of the task.
        """
        for name in settings:
            if name not in self.settings:
                raise FocusConfigError(bad_value(f"settings of {self.name}", name, ", ".join(self.settings)))
        return {**self.settings, **settings}
