"""`FocusA` alone, with the seed's own code as an oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_every_parameter_learns, assert_same_buffers, buffers, fill
from torch import Tensor, nn

from hf_focus import FocusA, FocusConfig, Refiner
from hf_focus.errors import FocusConfigError
from hf_focus.layer import GlobalAttention
from hf_focus.observers import observe

DIMS, HEADS, LENGTH = 16, 4, 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def layer(std: float = 0.3, **settings: Any) -> FocusA:
    """One that acts, in eval mode."""
    return fill(FocusA(DIMS, HEADS, **{"max_span": 6, "ramp": 3, **settings}), std=std).eval()


def sequence(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIMS, generator=torch.Generator().manual_seed(seed))


class Seed:
    """The part of the seed's `FocusA` that runs: `_focus` over one window, word for word but for what it counts."""

    def __init__(self, heads: int, max_span: int, max_dist: int, sharpen: bool, max_iterations: int) -> None:
        self.heads = heads
        self.max_span = max_span
        self.max_dist = max_dist
        self.sharpen = sharpen
        self.temp_scale = 0.01
        self.max_iterations = max_iterations
        self.attentions = 0

    def _focus(self, query: Tensor, key: Tensor, value: Tensor, span_scale: Tensor) -> tuple[Tensor, Tensor | None]:
        max_iterations = self.max_iterations
        iteration = 0
        prev_attn_out = torch.zeros_like(input=query)
        attn_out = torch.zeros_like(input=query)
        attn_weights = None

        base_threshold = 1e-4
        scaling_factor = 0.1

        while iteration < max_iterations:
            span_len = int(self.max_span * span_scale.mean().item())
            span_len = min(span_len, query.size(1), key.size(1), value.size(1))
            eff_span = min(span_len, self.max_dist)

            if eff_span == 0:
                break

            q_span = query[:, :eff_span, :]
            k_span = key[:, :eff_span, :]
            v_span = value[:, :eff_span, :]

            batch_size, seq_len, dims = q_span.size()
            d_k = dims // self.heads
            scale_factor = 1 / math.sqrt(d_k)

            q = q_span.view(batch_size, seq_len, self.heads, -1).transpose(1, 2)
            k = k_span.view(batch_size, seq_len, self.heads, -1).transpose(1, 2)
            v = v_span.view(batch_size, seq_len, self.heads, -1).transpose(1, 2)

            if self.sharpen:
                temperature = 1.0 + self.temp_scale * (1.0 - span_scale.mean().item())
            else:
                temperature = 0.5 + self.temp_scale * span_scale.mean().item()

            attn_scores = torch.matmul(q, k.transpose(-2, -1)) * scale_factor / temperature
            attn_weights = torch.softmax(attn_scores, dim=-1)
            attn_out = torch.matmul(attn_weights, v)
            attn_out = attn_out.transpose(1, 2).contiguous().view(batch_size, seq_len, -1)
            self.attentions += 1
            diff = torch.abs(attn_out - prev_attn_out).mean()
            dynamic_threshold = base_threshold + scaling_factor * diff

            if diff < dynamic_threshold:
                break

            prev_attn_out = attn_out
            query = query + attn_out
            iteration += 1
        return attn_out, attn_weights


@pytest.mark.parametrize("sharpen", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize(("max_span", "max_dist"), [(LENGTH, 40), (50, 12)])
def test_seed(sharpen: bool, iterations: int, max_span: int, max_dist: int) -> None:
    """One window over the whole input, span 1, F the identity, no early stop: what the seed's code computes."""
    module = layer(
        refiner=False,
        sharpen=sharpen,
        max_span=max_span,
        max_dist=max_dist,
        max_iterations=iterations,
        base_threshold=0.0,
    )
    module.focus.predictor.bias.data.fill_(100.0)
    if iterations > 1:
        module.focus.feedback_matrix.data.zero_()
    x = sequence()
    seed = Seed(HEADS, max_span, max_dist, sharpen, iterations)
    local, globe = module.ln_a(x), module.attn_global(module.ln_b(x))
    local_out, _ = seed._focus(local, local, local, torch.ones(1))
    assert seed.attentions == iterations
    expected = module.projection(torch.cat([local_out, globe], dim=-1))
    torch.testing.assert_close(module(x), expected, **CLOSE)


def test_seeds_stop_of_a_single_token() -> None:
    """Where the seed's window holds one token, its stop rule is this one: the second attention changes nothing."""
    module = layer(refiner=False, max_span=LENGTH, base_threshold=1e-4)
    module.focus.predictor.bias.data.fill_(100.0)
    module.focus.feedback_matrix.data.zero_()
    x, seed, records = sequence(1, 1), Seed(HEADS, LENGTH, LENGTH, True, 10), []
    local = module.ln_a(x)
    local_out, _ = seed._focus(local, local, local, torch.ones(1))
    with observe(lambda _, record: records.append(record)):
        output = module(x)
    assert seed.attentions == 2
    assert (records[0].iterations == 2).all()
    globe = module.attn_global(module.ln_b(x))
    torch.testing.assert_close(output, module.projection(torch.cat([local_out, globe], dim=-1)), **CLOSE)


def test_seeds_predictor_and_span() -> None:
    """Untouched settings: one span for all from the mean over time, corrected by nothing until trained."""
    module, x, records = layer(), sequence(), []
    module.focus.refiner.table.zero_()
    with observe(lambda _, record: records.append(record)):
        module(x)
    globe = module.attn_global(module.ln_b(x))
    predicted = torch.sigmoid(
        torch.nn.functional.linear(globe.mean(dim=1), module.focus.predictor.weight, module.focus.predictor.bias)
    )
    torch.testing.assert_close(records[0].span_fraction, predicted[:, None].expand(2, 1, LENGTH), **CLOSE)
    torch.testing.assert_close(records[0].span, 6 * records[0].span_fraction)
    assert (records[0].action == 9).all()


def test_seeds_arguments() -> None:
    refiner = Refiner(states=10000, actions=10, alpha=0.1, gamma=0.9, epsilon=0.1)
    # dims, heads, max_dist, refiner, sharpen, win_size, max_span
    module = FocusA(DIMS, HEADS, 64, refiner, False, 8, 32)
    names = {"dims": DIMS, "heads": HEADS, "max_dist": 64, "refiner": refiner, "sharpen": False}
    same = FocusA(**names, win_size=8, max_span=32)
    for one in (module, same):
        assert one.focus.refiner is refiner
        assert one.config == same.config
        assert (one.config.max_dist, one.config.sharpen) == (64, False)
        assert (one.config.window_size, one.config.max_span) == (8, 32)
        assert (one.config.temperature, one.config.feedback, one.config.readout) == ("seed", "additive", "last")
        assert (one.config.max_iterations, one.config.combine, one.config.per_head_span) == (10, "projection", False)
        assert one(sequence()).shape == (2, LENGTH, DIMS)
    assert {"ln_a", "ln_b", "attn_global", "projection"} < {name for name, _ in module.named_children()}
    assert module.projection.weight.shape == (DIMS, 2 * DIMS)
    assert FocusA(DIMS, HEADS, 64, False, True, 8, 32).focus.refiner is None


def test_readme_call() -> None:
    module = FocusA(dims=512, heads=8, max_dist=512, sharpen=True, win_size=256, max_span=512)
    assert module(torch.randn(1, 5, 512)).shape == (1, 5, 512)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("heads", {"heads": 0}),
        ("heads", {"heads": "4"}),
        ("dims", {"heads": 3}),
        ("dims", {"dims": 0}),
        ("dims", {"dims": 16.0}),
        ("refiner", {"refiner": "yes"}),
        ("refiner", {"refiner": None}),
        ("max_span", {"max_span": 0}),
        ("max_dist", {"max_dist": 0}),
        ("window_size", {"win_size": 0}),
        ("sharpen", {"sharpen": 1}),
        ("span_granularity", {"is_causal": True, "span_granularity": "sequence"}),
        ("span_granularity", {"is_causal": True, "span_granularity": "window"}),
        ("focus_config", {"max_spam": 3}),
    ],
)
def test_bad_arguments(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(FocusConfigError) as error:
        FocusA(**{"dims": DIMS, "heads": HEADS, **settings})
    assert str(error.value).startswith(f"`{name}` got ")
    assert "accepted" in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"max_dist": 3}, {"max_dist": 4, "sink_tokens": 1}])
@pytest.mark.parametrize("is_causal", [True, False])
def test_global_attention(is_causal: bool, settings: dict[str, int]) -> None:
    """It is PyTorch's multi-head attention with the same weights."""
    module = fill(GlobalAttention(DIMS, HEADS, **settings))
    other = nn.MultiheadAttention(DIMS, HEADS, batch_first=True)
    bias = torch.cat([module.query.bias, torch.zeros(DIMS), module.value.bias])
    other.in_proj_bias.data.copy_(bias)
    other.in_proj_weight.data.copy_(torch.cat([part.weight for part in (module.query, module.key, module.value)]))
    other.out_proj.load_state_dict(module.out.state_dict())
    x, position = sequence(), torch.arange(LENGTH)
    distance = position[:, None] - position
    hidden = (distance.abs() >= settings.get("max_dist", LENGTH)) & (position >= settings.get("sink_tokens", 0))
    hidden = hidden | ((distance < 0) & is_causal)
    torch.testing.assert_close(module(x, is_causal=is_causal), other(x, x, x, attn_mask=hidden)[0], **CLOSE)


VARIANTS = {
    "seed": {},
    "causal": {"is_causal": True},
    "causal max_dist": {"is_causal": True, "max_dist": 4, "sink_tokens": 1},
    "max_dist": {"max_dist": 4},
    "window": {"span_granularity": "window", "win_size": 4},
    "token": {"span_granularity": "token"},
    "hf": {
        "per_head_span": True,
        "temperature": "learned",
        "feedback": "normalized",
        "readout": "mixture",
        "max_iterations": 4,
    },
    "causal hf": {"feedback": "normalized", "readout": "mixture", "max_iterations": 4, "is_causal": True},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", ["int", "bool", "float", "full bool", "full additive"])
def test_padding_does_not_matter(settings: dict[str, Any], left: bool, kind: str) -> None:
    module, x, padded = layer(**settings), sequence(), 5
    hidden = slice(0, padded) if left else slice(LENGTH - padded, LENGTH)
    shown = slice(padded, LENGTH) if left else slice(0, LENGTH - padded)
    x[1, hidden] = 100 * torch.randn(padded, DIMS, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, hidden] = False
    full = mask[:, None, None].expand(2, 1, LENGTH, LENGTH)
    mask = {
        "int": mask.long(),
        "bool": mask,
        "float": mask.float(),
        "full bool": full,
        "full additive": torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min),
    }[kind]
    together = module(x, mask)
    assert together.isfinite().all()
    torch.testing.assert_close(together[1:, shown], module(x[1:, shown]), **CLOSE)
    torch.testing.assert_close(together[:1], module(x[:1]), **CLOSE)


@variants
def test_gradients_with_padding(settings: dict[str, Any]) -> None:
    """Padding of zeros, seen by nothing: every weight has a finite gradient, and the padding has none."""
    module, x = layer(**settings).train(), sequence()
    x[1, :5] = 0
    x.requires_grad_()
    mask = torch.ones(2, LENGTH)
    mask[1, :5] = 0
    output = module(x, mask)
    (output * mask[..., None]).square().mean().backward()
    assert_every_parameter_learns(module)
    assert torch.equal(x.grad[1, :5], torch.zeros(5, DIMS))
    assert (x.grad[mask.bool()].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("settings", [VARIANTS["causal"], VARIANTS["causal max_dist"], VARIANTS["causal hf"]])
@pytest.mark.parametrize("masked", [False, True])
def test_strictly_causal(settings: dict[str, Any], training: bool, masked: bool) -> None:
    module, x, changed = layer(**settings).train(training), sequence(), sequence()
    changed[:, 7] += torch.linspace(-1, 1, DIMS)
    mask = torch.ones(2, LENGTH) if masked else None
    results = []
    for given in (x, changed):
        torch.manual_seed(0)
        results.append(module(given, mask))
    assert torch.equal(results[0][:, :7], results[1][:, :7])
    assert ((results[0] - results[1])[:, 7].abs().amax(-1) > 1e-3).all()


def test_not_causal_sees_both_sides() -> None:
    module, x = layer(), sequence()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[:, 6].sum(), x)
    assert (grad.abs().amax(-1) > 0).all()


@variants
def test_eval_is_deterministic_and_changes_no_buffer(settings: dict[str, Any]) -> None:
    module, x = layer(**settings), sequence()
    before = buffers(module)
    first = module(x)
    first.sum().backward()
    assert torch.equal(first, module(x))
    assert_same_buffers(module, before)


def test_training_updates_the_given_refiner() -> None:
    refiner = Refiner(epsilon=0.5)
    module = layer(refiner=refiner).train()
    for count in (1, 2):
        module(sequence()).sum().backward()
        module.zero_grad()
        assert refiner.state_dict()["num_updates"].item() == count
    assert set(buffers(module)) == {f"focus.refiner.{name}" for name in buffers(refiner)}


@variants
def test_saved_is_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    module, x = layer(**settings).train(), sequence()
    module(x).sum().backward()
    module.eval()
    torch.save(module.state_dict(), tmp_path / "layer.pt")
    other = FocusA(DIMS, HEADS, **{"max_span": 6, "ramp": 3, **settings}).eval()
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), module(x))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_it_learns() -> None:
    """Trained end to end, it comes to give the mean of the last three tokens."""
    torch.manual_seed(0)
    module = FocusA(DIMS, HEADS, max_span=6, ramp=3, is_causal=True, max_iterations=2)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=5e-3), []
    for seed in range(150):
        x = sequence(8, seed=seed)
        target = nn.functional.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(module(x), target))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_settings_are_those_of_the_config() -> None:
    module = layer(max_iterations=3, feedback="normalized")
    assert isinstance(module.config, FocusConfig)
    assert module.config.max_iterations == 3
    assert module.focus.config is module.config


@pytest.mark.parametrize("actions", [5, 20])
def test_a_refiner_of_other_actions_learns_all_of_them(actions: int) -> None:
    refiner = Refiner(actions=actions)
    module = layer(refiner=refiner, reward="mass", initial_span=0.9).train()
    before = refiner.table.clone()
    for _ in range(3):
        module(sequence()).sum().backward()
    assert (module.eval().focus.refiner.table != before).any(dim=0).all()
