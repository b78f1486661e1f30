"""The predictor, the soft span mask and the temperatures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_focus import AdaptiveSpan, Predictor
from hf_focus.iteration import log_weight, soft_span_mask
from hf_focus.span import count_in_span


@given(
    st.floats(0, 12),
    st.integers(1, 6),
    st.integers(1, 15),
    st.integers(0, 20),
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_soft_mask_values(span: float, ramp: int, max_span: int, distance: int) -> None:
    weight = soft_span_mask(torch.tensor(distance), torch.tensor(span, dtype=torch.float64), ramp, max_span).item()
    if distance >= max_span:
        assert weight == 0
    else:
        assert weight == pytest.approx(min(max((ramp + span - distance) / ramp, 0), 1), abs=1e-12)
    if distance == 0:
        assert weight == 1
    if distance <= span and distance < max_span:
        assert weight == 1
    if distance >= span + ramp:
        assert weight == 0


def test_soft_mask_gradient_is_on_the_edge_only() -> None:
    span = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    for distance in range(12):
        weight = soft_span_mask(torch.tensor(distance), span, ramp=4, max_span=7)
        (slope,) = torch.autograd.grad(weight, span)
        assert slope.item() == (1 / 4 if 3.5 < distance < 7 else 0), distance


def test_log_weight() -> None:
    weight = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    value = log_weight(weight)
    assert value.tolist() == [-math.inf, math.log(0.25), 0.0]
    (slope,) = torch.autograd.grad(value, weight, torch.ones(3, dtype=torch.float64))
    assert slope.tolist() == [0.0, 4.0, 1.0]


@pytest.mark.parametrize("sharpen", [True, False])
@pytest.mark.parametrize("temp_scale", [0.01, 0.3])
def test_seed_temperatures(sharpen: bool, temp_scale: float) -> None:
    module = AdaptiveSpan(num_heads=2, max_span=16, temperature="seed", sharpen=sharpen, temp_scale=temp_scale)
    assert not list(module.parameters())
    scale = torch.tensor([0.0, 0.3, 1.0]).expand(1, 2, 3)
    span, temperature = module(scale, torch.ones(1, 1, 3))
    expected = 1 + temp_scale * (1 - scale) if sharpen else 0.5 + temp_scale * scale
    torch.testing.assert_close(temperature, expected)
    torch.testing.assert_close(span, 16 * scale)


def test_learned_temperature_starts_at_one() -> None:
    _, temperature = AdaptiveSpan(2, 16)(torch.rand(3, 2, 5), torch.randint(1, 9, (3, 1, 5)))
    assert torch.equal(temperature, torch.ones(3, 2, 5))


@pytest.mark.parametrize("shared", [False, True])
def test_learned_temperature(shared: bool) -> None:
    module = AdaptiveSpan(2, 16)
    torch.nn.init.normal_(module.coefficients, generator=torch.Generator().manual_seed(0))
    scale, keys = torch.rand(3, 1 if shared else 2, 5), torch.randint(1, 9, (3, 1, 5))
    span, temperature = module(scale, keys)
    assert span.shape == scale.shape
    assert temperature.shape == (3, 2, 5)
    for head in range(2):
        constant, slope, exponent = module.coefficients[:, head]
        expected = constant + slope * scale[:, 0 if shared else head] + exponent * (1 + keys[:, 0].log()).log()
        torch.testing.assert_close(-temperature[:, head].log(), expected, rtol=1e-4, atol=1e-5)


def test_the_exponent_starts_as_asked() -> None:
    num_keys = torch.tensor([1, 16, 256])
    temperature = AdaptiveSpan(1, 16, exponent=2.0)(torch.rand(1, 1, 3), num_keys)[1].detach()
    expected = ((1 + num_keys.log()) / (1 + math.log(16))) ** -2
    torch.testing.assert_close(temperature[0, 0], expected)
    assert temperature[0, 0, 1] == pytest.approx(1, abs=1e-6)


def test_learned_temperature_can_be_scalable_softmax() -> None:
    """At exponent 1 the scores grow with the logarithm of the number of keys."""
    module = AdaptiveSpan(1, 16)
    with torch.no_grad():
        module.coefficients[2] = 1
    keys = torch.tensor([1.0, 10.0, 1000.0])
    _, temperature = module(torch.rand(1, 1, 3), keys)
    torch.testing.assert_close(1 / temperature[0, 0], 1 + keys.log())


@pytest.mark.parametrize("initial", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("outputs", [1, 3])
def test_predictor_starts_at_its_initial_span(initial: float, outputs: int) -> None:
    predictor = Predictor(8, outputs, initial)
    span = predictor(torch.randn(2, 5, 8))
    assert span.shape == (2, outputs, 5)
    torch.testing.assert_close(span, torch.full_like(span, initial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_predictor(dtype: torch.dtype) -> None:
    predictor = Predictor(8, 3).to(dtype)
    torch.nn.init.normal_(predictor.weight)
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    span = predictor(x)
    assert span.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, bias = predictor.weight.double(), predictor.bias.double()
    expected = torch.sigmoid(x.double() @ weight.T + bias).transpose(1, 2)
    torch.testing.assert_close(span.double(), expected, rtol=1e-5, atol=1e-5)
    span.sum().backward()
    # The model learns too to say how far to look
    for tensor in (x, *predictor.parameters()):
        assert tensor.grad.abs().min() > 0


def test_predictor_learns_from_its_start() -> None:
    predictor = Predictor(8, 2)
    predictor(torch.randn(2, 5, 8)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in predictor.parameters())


@pytest.mark.parametrize("is_causal", [True, False])
def test_count_in_span(is_causal: bool) -> None:
    """It counts the keys at full weight of a query that has enough keys on every side."""
    visible, max_span = torch.tensor([1, 4, 40]), 20
    for z in (0.0, 0.7, 1.0, 6.5):
        span = torch.full((1, 1, 3), z, requires_grad=True)
        distance = torch.arange(-50, 51)
        full = (soft_span_mask(distance.abs(), torch.tensor(z), 1, max_span) == 1) & (
            (distance >= 0) | (not is_causal)
        )
        count = count_in_span(visible, span, is_causal)
        assert not count.requires_grad
        assert count.tolist() == [[[min(n, full.sum().item()) for n in visible.tolist()]]]
