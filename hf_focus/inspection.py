"""What a model with FocusA consists of, and what it does on text: what `hf-focus inspect` shows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attention import keep_problems
from .blocked import solve
from .branch import FocusBranch
from .errors import FocusDataError, NotPatchedError, bad_value
from .modeling import FocusMixin, read_patch
from .observers import FocusRecord, observe
from .problem import FocusProblem
from .reference import focus_reference
from .refiner import Refiner
from .sites import find_sites

# A weight up to this counts as none
NEGLIGIBLE = 1e-3
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class RefinerReport:
    """How far a Q-table has moved from its start, where every entry is 0.

    updates: steps of learning. states_visited: rows that moved. mean_change, largest_change: absolute, of the entries
    that moved. action_values: mean Q of each action over the rows that moved.
    """

    updates: int
    states_visited: int
    mean_change: float
    largest_change: float
    action_values: list[float]


@dataclass(frozen=True)
class LayerMeasures:
    """What one layer did on the text. Lists are one value a head, unless said otherwise.

    is_causal: whether queries see only what is before them. span: mean, in tokens. span_quantiles: (heads, 5), see
    `QUANTILES`. entropy: of the last local attention, in nats. effective_keys: mean exp(entropy): among how many keys
    the attention is spread. coverage: share of the keys in the span with weight above `coverage_threshold`. kept: the
    same above `NEGLIGIBLE`; 1 − kept is the sparsity. iterations: mean attentions made. iteration_counts:
    (max_iterations,) queries that made 1, 2, …. readout: (heads, max_iterations) mean weight of each iterate in the
    output, None where the last is taken. temperature: mean τ. action_counts: (num_actions,) how often the refiner
    chose each, None without one. entropy_by_context: mean entropy by `Inspection.context_bins`, None where a bin is
    empty.
    """

    is_causal: bool
    span: list[float]
    span_quantiles: list[list[float]]
    entropy: list[float]
    effective_keys: list[float]
    coverage: list[float]
    kept: list[float]
    iterations: list[float]
    iteration_counts: list[int]
    readout: list[list[float]] | None
    temperature: list[float]
    action_counts: list[int] | None
    entropy_by_context: list[float | None]


@dataclass(frozen=True)
class LayerReport:
    """One attention layer with FocusA. join_size: root mean square of the join's weights; 0: the layer's output is
    that of the global branch, the model's own but for settings that change it. measures: None where no text reached
    the layer."""

    name: str
    heads: int
    parameters: int
    join_size: float
    refiner: RefinerReport | None
    measures: LayerMeasures | None


@dataclass(frozen=True)
class AttentionMap:
    """Local attention of one head over one text, rows are queries, columns keys.

    first, last: of the attentions that each query made. change: share of the weight that moved in between, mean over
    the queries.
    """

    layer: str
    head: int
    tokens: list[str]
    first: list[list[float]]
    last: list[list[float]]
    change: float


@dataclass(frozen=True)
class Inspection:
    """All that `inspect_model` finds.

    layers_in_model: attention layers that FocusA could be on. buffer_bytes: of FocusA's buffers, which are the
    refiners'. context_bins: largest context (tokens that a query could see, the span aside) of each bin.
    """

    model_class: str
    model_type: str
    settings: dict[str, Any]
    base_parameters: int
    focus_parameters: int
    buffer_bytes: int
    layers_in_model: int
    layers: list[LayerReport]
    texts: int
    tokens: int
    context_bins: list[int]
    maps: list[AttentionMap]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] = (),
    *,
    max_tokens: int = 512,
    map_tokens: int = 32,
    num_maps: int = 4,
    show_progress: bool = False,
) -> Inspection:
    """Describe a model with FocusA, and measure it on some texts. Nothing of the model changes.

    ```python
    inspection = inspect_model(model, tokenizer, ["some text", "some more"])
    inspection.layers[0].measures.span       # mean span of each head, in tokens
    ```

    Args:
        model: with FocusA.
        tokenizer: None: nothing is measured.
        texts: what to measure on. They are cut to different lengths, so that every length of context occurs.
        max_tokens: of a text.
        map_tokens: of the first text, for the attention maps.
        num_maps: attention maps to make, of the heads whose attention changes most.
        show_progress: a progress bar.

    Raises:
        NotPatchedError: the model carries no FocusA.
        FocusDataError: the texts hold no tokens.
    """
    if not isinstance(model, FocusMixin):
        raise NotPatchedError(
            bad_value("model", type(model).__name__, "a model with FocusA; `hf-focus patch` adds it")
        )
    branches = {name.removesuffix(".focus"): m for name, m in model.named_modules() if isinstance(m, FocusBranch)}
    collected = {name: _Layer(branch) for name, branch in branches.items()}
    maps: list[AttentionMap] = []
    was_training = model.training
    model.eval()
    try:
        sequences = [] if tokenizer is None else _encode(tokenizer, texts, max_tokens)
        with observe_problems(model, lambda name, problem, record: collected[name].add(problem, record)):
            for ids in tqdm(sequences, desc="Measuring", leave=False, disable=not (show_progress and sequences)):
                _run(model, ids)
        if sequences:
            ids = sequences[0][:, :map_tokens]
            maps = attention_maps(model, ids, [tokenizer.decode([token]) for token in ids[0].tolist()], num_maps)
    finally:
        model.train(was_training)
    bins = _context_bins(max((layer.longest for layer in collected.values()), default=0))
    focus_parameters = sum(p.numel() for branch in branches.values() for p in branch.parameters())
    return Inspection(
        model_class=type(model).__name__,
        model_type=type(model.config).base_class.model_type,
        settings=model.focus_config.to_dict(),
        base_parameters=model.num_parameters() - focus_parameters,
        focus_parameters=focus_parameters,
        buffer_bytes=sum(b.numel() * b.element_size() for branch in branches.values() for b in branch.buffers()),
        layers_in_model=len(find_sites(model, read_patch(model.config)[1])),
        layers=[layer.report(name, bins) for name, layer in collected.items()],
        texts=len(sequences),
        tokens=sum(ids.shape[1] for ids in sequences),
        context_bins=bins,
        maps=maps,
    )


@contextmanager
def observe_problems(model: nn.Module, keep: Callable[[str, FocusProblem, FocusRecord], None]) -> Iterator[None]:
    """Call `keep(layer name, problem, record)` for every local attention of `model` inside the `with`."""
    names = {id(m): name.removesuffix(".focus") for name, m in model.named_modules() if isinstance(m, FocusBranch)}
    with keep_problems() as solved:

        def observer(branch: nn.Module, record: FocusRecord) -> None:
            # A branch tells its observers right after it has solved its problem
            if id(branch) in names:
                keep(names[id(branch)], solved[-1], record.detach())
            solved.clear()

        with observe(observer):
            yield


def attention_weights(problem: FocusProblem, iteration: Tensor) -> Tensor:
    """Local attention weights (1, H, T, S) of one of the attentions that each query made.

    The reference averages the identity instead of the values, so that its output is the weights. Fed back through
    V·F what was fed back through F before, every iteration stays what it was.

    Args:
        problem: of one sequence.
        iteration: (1, H, T) int64, counted from 0.
    """
    heads, kv_heads, num_keys = problem.num_heads, *problem.key.shape[1:3]
    value = problem.value[0].repeat_interleave(heads // kv_heads, dim=0).to(problem.compute_dtype)
    matrix = problem.feedback_matrix
    if matrix is None:
        matrix = torch.eye(value.shape[-1], problem.query.shape[-1], device=value.device)
    identity = torch.eye(num_keys, dtype=value.dtype, device=value.device).expand(1, kv_heads, -1, -1)
    choice = nn.functional.one_hot(iteration, problem.max_iterations).to(value.dtype)
    return focus_reference(
        replace(
            problem,
            query=problem.query.to(value.dtype),
            value=identity,
            feedback_matrix=value @ matrix.to(value.dtype),
            readout_weights=choice,
            # The rule looks at outputs, which are others now: nobody stops, and `iteration` chooses
            base_threshold=0.0,
            need_statistics=False,
        )
    ).output


def attention_maps(model: PreTrainedModel, ids: Tensor, tokens: list[str], count: int) -> list[AttentionMap]:
    """The local attention before and after focus, of the heads in which it changes most.

    Args:
        model: with FocusA, in eval mode.
        ids: (1, n) token ids.
        tokens: how to call them.
        count: maps to return, at most.
    """
    maps: list[AttentionMap] = []

    def keep(name: str, problem: FocusProblem, record: FocusRecord) -> None:
        first = attention_weights(problem, torch.zeros_like(record.iterations))[0].cpu()
        last = attention_weights(problem, record.iterations - 1)[0].cpu()
        changes = (last - first).abs().sum(dim=-1).mean(dim=-1) / 2
        found = [
            AttentionMap(name, head, tokens, first[head].tolist(), last[head].tolist(), change)
            for head, change in enumerate(changes.tolist())
        ]
        # Kept small as it grows: a large model has a thousand heads
        maps[:] = nlargest(count, [*maps, *found], key=lambda item: item.change)

    with observe_problems(model, keep):
        _run(model, ids)
    return maps


class _Layer:
    """What one layer did, call by call, and what is left of it at the end."""

    def __init__(self, branch: FocusBranch) -> None:
        self.branch = branch
        self.calls: dict[str, list[Tensor]] = {}
        self.longest = 0
        self.is_causal = True

    def add(self, problem: FocusProblem, record: FocusRecord) -> None:
        length, num_keys = problem.query.shape[2], problem.key.shape[2]
        context = torch.arange(length) + problem.query_offset + 1 if problem.is_causal else torch.tensor([num_keys])
        values = {
            "span": record.span,
            "entropy": record.entropy,
            "coverage": record.coverage,
            "kept": solve(replace(problem, coverage_threshold=NEGLIGIBLE, need_statistics=True)).coverage,
            "iterations": record.iterations,
            "temperature": problem.sharpness.reciprocal(),
            "context": context[None, None],
            "action": record.action,
            "readout": problem.readout_weights,
        }
        self.is_causal = problem.is_causal
        self.longest = max(self.longest, int(context.max()))
        shape = (1, problem.num_heads, length)
        for name, value in values.items():
            if value is not None:
                wanted = shape if value.ndim == 3 else value.shape
                self.calls.setdefault(name, []).append(value.float().expand(wanted)[0].cpu())

    def report(self, name: str, bins: list[int]) -> LayerReport:
        join, refiner = self.branch.join, self.branch.refiner
        return LayerReport(
            name=name,
            heads=self.branch.num_heads,
            parameters=sum(p.numel() for p in self.branch.parameters()),
            join_size=join.detach().float().square().mean().sqrt().item(),
            refiner=None if refiner is None else _describe_refiner(refiner),
            measures=self._measures(bins) if self.calls else None,
        )

    def _measures(self, bins: list[int]) -> LayerMeasures:
        # (heads, all tokens), the read-out (heads, all tokens, iterations)
        joined = {name: torch.cat(parts, dim=1) for name, parts in self.calls.items()}

        def by_head(values: Tensor) -> list[float]:
            return values.mean(dim=1).tolist()

        def counts(name: str, size: int, first: int = 0) -> list[int]:
            return torch.bincount(joined[name].long().flatten() - first, minlength=size).tolist()

        places = torch.bucketize(joined["context"], torch.tensor(bins, dtype=torch.float32))
        within = [joined["entropy"][places == number] for number in range(len(bins))]
        quantiles = torch.quantile(joined["span"], torch.tensor(QUANTILES), dim=1)
        return LayerMeasures(
            is_causal=self.is_causal,
            span=by_head(joined["span"]),
            span_quantiles=quantiles.T.tolist(),
            entropy=by_head(joined["entropy"]),
            effective_keys=by_head(joined["entropy"].exp()),
            coverage=by_head(joined["coverage"]),
            kept=by_head(joined["kept"]),
            iterations=by_head(joined["iterations"]),
            iteration_counts=counts("iterations", self.branch.config.max_iterations, first=1),
            readout=joined["readout"].mean(dim=1).tolist() if "readout" in joined else None,
            temperature=by_head(joined["temperature"]),
            action_counts=counts("action", self.branch.config.num_actions) if "action" in joined else None,
            entropy_by_context=[part.mean().item() if part.numel() else None for part in within],
        )


def _describe_refiner(refiner: Refiner) -> RefinerReport:
    table = refiner.table.detach().float().cpu()
    moved = table[table != 0].abs()
    rows = table[(table != 0).any(dim=1)]
    return RefinerReport(
        updates=int(refiner.num_updates),
        states_visited=rows.shape[0],
        mean_change=moved.mean().item() if moved.numel() else 0.0,
        largest_change=moved.max().item() if moved.numel() else 0.0,
        action_values=(rows if rows.shape[0] else table[:1]).mean(dim=0).tolist(),
    )


def _context_bins(longest: int) -> list[int]:
    """1, 2, 4, … until `longest` is within."""
    return [2**power for power in range((longest - 1).bit_length() + 1)] if longest else []


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int) -> list[Tensor]:
    sequences = []
    for number, text in enumerate(texts):
        # Where attention sees both sides, only a shorter text is a shorter context
        limit = max(max_tokens >> (number % 4), 1)
        # The rest would be tokenized to be cut off
        encoded = tokenizer(text[: 32 * limit], truncation=True, max_length=limit, return_tensors="pt")
        if encoded["input_ids"].numel():
            sequences.append(encoded["input_ids"].long())
    if not sequences:
        raise FocusDataError(bad_value("texts", "no tokens", "at least one text that is not empty"))
    return sequences


@torch.no_grad()
def _run(model: PreTrainedModel, ids: Tensor) -> None:
    ids = ids.to(model.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, **decoder)
