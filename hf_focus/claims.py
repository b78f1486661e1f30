"""What claims about attention are measured by, for any model: its spread, collapse of ranks, a hidden number found."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import FocusConfigError, FocusDataError, bad_value
from .interface import global_name
from .modeling import FocusMixin
from .packing import count_bytes
from .recording import record_focus

# A weight above this counts as attended to
ATTENDED = 1e-3
# The text that numbers are hidden in (passkey retrieval, 2305.16300)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
DIGITS = 5
# What the measures say, for who reads them
MEANINGS = {
    "bits_per_byte": "of the same texts, each token given those before it",
    "entropy": "nats: how widely a query's attention is spread",
    "entropy_share": "entropy / log n: 1 all keys alike (dispersed), 0 a single key",
    "effective_tokens": "exp(entropy): keys that share the attention",
    "attended": f"share of the visible keys with a weight above {ATTENDED:g}",
    "rank_residual": "of the last layer's tokens: 0 all have become alike (rank collapse)",
    "rank_residual_ratio": "the same, as a share of that of the first layer's input",
    "local_span": "mean span, in tokens",
    "local_entropy": "as entropy, of the local branch",
    "local_entropy_share": "its entropy / log n, n the keys that the global branch sees",
    "local_effective_tokens": "as effective_tokens, of the local branch",
    "local_coverage": "share of the keys in the span with a weight above coverage_threshold",
    "local_iterations": "mean attentions that a query made",
}


def meaning(name: str) -> str:
    """What a measure says, in a line; `passkey_512` and its like: a hidden number found in so many tokens;
    `rank_residual_layer_2`: of that layer's input."""
    kind, _, number = name.rpartition("_")
    if kind == "passkey":
        return f"share of the numbers hidden in {number} tokens that are told right"
    if kind == "rank_residual_layer":
        return f"as rank_residual, of the input of layer {number}"
    return MEANINGS[name]


def attention_spread(weights: Tensor, visible: Tensor | None = None) -> dict[str, Tensor]:
    """How widely attention is spread, of each query.

    Args:
        weights: (..., S), which sum to 1.
        visible: (...), how many keys the query may see; None: those with any weight.

    Returns:
        (...) each. entropy in nats; entropy_share: entropy / log n, 0 for a single key (1: dispersed, 0: one key);
        effective_tokens: exp(entropy); attended: share of the n keys with a weight above 1e-3.
    """
    weights = weights.float()
    count = (weights > 0).sum(-1) if visible is None else visible
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return {
        "entropy": entropy,
        "entropy_share": torch.where(count > 1, entropy / count.clamp_min(2).float().log(), 0),
        "effective_tokens": entropy.exp(),
        "attended": (weights > ATTENDED).sum(-1) / count.clamp_min(1),
    }


def rank_residual(hidden: Tensor) -> Tensor:
    """‖X − 1xᵀ‖ / ‖X‖ of each sequence, x the mean token: 0 where all tokens have become one (2103.03404).

    Args:
        hidden: (..., T, D).
    """
    hidden = hidden.float()
    rest = hidden - hidden.mean(dim=-2, keepdim=True)
    return rest.flatten(-2).norm(dim=-1) / hidden.flatten(-2).norm(dim=-1).clamp_min(1e-12)


@torch.no_grad()
def measure_attention(
    model: PreTrainedModel,
    sequences: Iterable[Tensor],
    *,
    queries: Tensor | None = None,
    show_progress: bool = False,
    **inputs: Any,
) -> dict[str, float]:
    """Spread of attention and collapse of ranks, means over layers, heads and tokens.

    Needs the attention weights: the model runs with eager attention, T × T a head, for this. Of a model with FocusA
    the spread is of the global branch; `local_…` is of the local one.

    Args:
        model: encoder or decoder; its mode and attention are restored.
        sequences: token ids (1, T) without padding.
        queries: (T,) bool, the tokens whose attention is measured, such as those that give an answer; None: all.
        show_progress: a progress bar.
        inputs: what else the model is called with.

    Returns:
        means of `attention_spread`; rank_residual of the last layer; rank_residual_ratio: to that of the first layer's
        input; rank_residual_layer_0 and so on: of each layer's input. With FocusA: local_span, local_entropy,
        local_entropy_share, local_effective_tokens, local_coverage, local_iterations.

    Raises:
        FocusConfigError: the model gives no attention weights.
        FocusDataError: there is no sequence.
    """
    sums: dict[str, float] = {}
    count = 0
    with _eager(model):
        for ids in tqdm(sequences, desc="Measuring attention", leave=False, disable=not show_progress):
            for name, value in _measure_one(model, ids.to(model.device), queries, inputs).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
    if not count:
        raise FocusDataError(bad_value("sequences", "none", "at least one text"))
    return {name: value / count for name, value in sums.items()}


def _measure_one(
    model: PreTrainedModel, ids: Tensor, queries: Tensor | None, inputs: dict[str, Any]
) -> dict[str, float]:
    asked = slice(None) if queries is None else queries.to(ids.device)
    options = {**inputs, "output_attentions": True, "output_hidden_states": True}
    if isinstance(model, FocusMixin):
        with record_focus(model) as records:
            outputs = model(input_ids=ids, **options)
        calls = [call for layer in records for call in records[layer]]
    else:
        outputs, calls = model(input_ids=ids, **options), []
    attentions = [weights for weights in outputs.attentions or () if weights is not None]
    if not attentions:
        raise FocusConfigError(bad_value("model", type(model).__name__, "one whose eager attention gives weights"))
    # (B, 1, T); a single key has no spread
    log_keys = (attentions[0] > 0).sum(-1).amax(1, keepdim=True).clamp_min(2).log()
    found: dict[str, list[Tensor]] = {}
    for weights in attentions:
        for name, values in attention_spread(weights[:, :, asked]).items():
            found.setdefault(name, []).append(values.mean())
    *inputs_of_layers, last = (rank_residual(hidden).mean() for hidden in outputs.hidden_states)
    found |= {"rank_residual": [last], "rank_residual_ratio": [last / inputs_of_layers[0].clamp_min(1e-12)]}
    found |= {f"rank_residual_layer_{layer}": [residual] for layer, residual in enumerate(inputs_of_layers)}
    for call in calls:
        local = {
            "span": call.span,
            "entropy": call.entropy,
            "entropy_share": call.entropy / log_keys,
            "effective_tokens": call.entropy.exp(),
            "coverage": call.coverage,
            "iterations": call.iterations,
        }
        for name, values in local.items():
            found.setdefault(f"local_{name}", []).append(values[:, :, asked].float().mean())
    return {name: torch.stack(values).mean().item() for name, values in found.items()}


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    was_training, before = model.training, global_name(model.config._attn_implementation)
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


@torch.no_grad()
def passkey_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    examples: int = 10,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, float]:
    """Share of hidden numbers that a causal model gets right, every token of them, at some lengths of text.

    The number stands at a random place in text that repeats itself; the right tokens before are given to it.

    Args:
        lengths: of the whole prompt, in tokens, about; those that are too short for a prompt are left out.
        examples: numbers at each length.
        show_progress: a progress bar.

    Returns:
        `passkey_<length>` -> share.
    """
    was_training, random, results = model.training, Random(seed), {}
    model.eval()
    device = next(model.parameters()).device
    for length in lengths:
        right, fits = 0, True
        for _ in tqdm(range(examples), desc=f"Hidden in {length}", leave=False, disable=not show_progress):
            ids, start = _passkey_prompt(tokenizer, length, random)
            fits = ids is not None
            if not fits:
                break
            ids = ids.to(device)
            predicted = model(input_ids=ids[:, :-1]).logits[0, start - 1 :].argmax(-1)
            right += bool((predicted == ids[0, start:]).all())
        if fits:
            results[f"passkey_{length}"] = right / examples
    model.train(was_training)
    return results


def _passkey_prompt(tokenizer: PreTrainedTokenizerBase, length: int, random: Random) -> tuple[Tensor | None, int]:
    """Ids (1, about `length`) that end with the number, and where it begins; None if nothing fits."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    number = "".join(random.choice("0123456789") for _ in range(DIGITS))
    hidden = encode(f"The pass key is {number}. Remember it. ")
    question, answer = encode("What is the pass key? The pass key is"), encode(f" {number}")
    filler = encode(FILLER)
    room = length - len(hidden) - len(question) - len(answer)
    if room < 0:
        return None, 0
    text = (filler * math.ceil(room / len(filler)))[:room]
    place = random.randint(0, room)
    before = text[:place] + hidden + text[place:] + question
    return torch.tensor([before + answer]), len(before)


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int = 512,
    show_progress: bool = False,
) -> float:
    """Bits that a causal model needs for a UTF-8 byte of some texts.

    Args:
        texts: of any length; of each the first `max_tokens` tokens are read, and all but the first of them predicted.
        show_progress: a progress bar.

    Raises:
        FocusDataError: there is nothing to predict.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, size = 0.0, 0
    for text in tqdm(texts, desc="Scoring text", leave=False, disable=not show_progress):
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids = torch.tensor([encoded["input_ids"][:max_tokens]], device=device)
        if ids.shape[1] > 1:
            offsets = encoded["offset_mapping"] if tokenizer.is_fast else None
            size += sum(count_bytes(text, len(encoded["input_ids"]), offsets)[1:max_tokens])
            logits = model(input_ids=ids).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    model.train(was_training)
    if not size:
        raise FocusDataError(bad_value("texts", f"{len(texts)} of them", "at least one of two tokens"))
    return nats / math.log(2) / size


def measure_claims(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int = 512,
    causal: bool = True,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Everything of this module on some texts: `measure_attention`; and of a causal model `bits_per_byte`, and
    `passkey_accuracy` at an eighth, a half and all of `max_tokens`.

    Args:
        texts: of any length; their first `max_tokens` tokens are read.
        causal: whether the model predicts the next token.
        show_progress: progress bars.
    """
    encoded = (tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt") for text in texts)
    sequences = (item["input_ids"] for item in encoded if item["input_ids"].numel() > 1)
    results: dict[str, Any] = measure_attention(model, sequences, show_progress=show_progress)
    if causal:
        lengths = [max_tokens // 8, max_tokens // 2, max_tokens]
        results["bits_per_byte"] = bits_per_byte(model, tokenizer, texts, max_tokens, show_progress)
        results |= passkey_accuracy(model, tokenizer, lengths, show_progress=show_progress)
    return results
