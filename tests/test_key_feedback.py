"""`feedback_through="keys"`: what is fed back is the mean of the keys that were attended to, and not of the values."""

import pytest
import torch
from helpers import DIM, HEADS, assert_every_parameter_learns, branch_inputs, fill
from small_runs import tiny_llama
from tiny import randomize

from hf_focus import FocusConfig, apply_focus, fold_feedback
from hf_focus.branch import FocusBranch
from hf_focus.errors import FocusConfigError
from hf_focus.rotary import Rotation

SETTINGS = {"max_span": 8, "ramp": 4, "max_iterations": 3, "base_threshold": 1e-3, "initial_span": 0.5}


def pair(value_dim: int, **settings: object) -> list[FocusBranch]:
    configs = (FocusConfig.build(SETTINGS, feedback_through=through, **settings) for through in ("keys", "features"))
    return [fill(FocusBranch(config, HEADS, DIM, value_dim)).eval() for config in configs]


@pytest.mark.parametrize("settings", [{}, {"feedback": "additive"}, {"readout": "last"}, {"refiner": True}], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_where_values_are_the_keys_nothing_changes(settings: dict[str, object], is_causal: bool) -> None:
    through_keys, through_features = pair(DIM, **settings)
    query, key, _, _ = branch_inputs(dtype=torch.float64)
    global_output = torch.randn(2, 16, HEADS, DIM, dtype=torch.float64)
    arguments = (query, key, key, global_output)
    found, expected = (
        part.double().attend(*arguments, is_causal=is_causal) for part in (through_keys, through_features)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    other = (query, key, torch.randn_like(key), global_output)
    assert not torch.allclose(through_keys.attend(*other), through_features.attend(*other))


def test_values_decide_nothing_but_the_output() -> None:
    """Twice the values are twice the output: the queries look at the same keys."""
    module, (query, key, value, global_output) = pair(5, base_threshold=0.0)[0].double(), branch_inputs()
    inputs = [x.double() for x in (query, key, value, global_output)]
    once, twice = (module.attend(*inputs[:2], times * inputs[2], inputs[3]) for times in (1, 2))
    torch.testing.assert_close(twice, 2 * once)
    module(*inputs).square().sum().backward()
    assert_every_parameter_learns(module)


def test_keys_that_are_rotated_are_not_rotated_again() -> None:
    module, inputs = pair(5, readout="last")[0], branch_inputs()
    angles = torch.arange(16.0)[None, :, None].expand(1, 16, DIM)
    rotation = Rotation(angles.cos(), angles.sin())
    torch.testing.assert_close(module.attend(*inputs, rotation=rotation), module.attend(*inputs))


def test_a_model_decodes_as_it_reads() -> None:
    model = randomize(apply_focus(tiny_llama(), feedback_through="keys", **SETTINGS)).eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 20:], rtol=1e-4, atol=1e-5)
    # There is nothing to fold
    assert fold_feedback(model).focus_config.feedback_through == "keys"
    assert torch.equal(model(ids).logits, whole)


def test_a_branch_that_rotates_by_itself_is_refused() -> None:
    """It rotates keys by their places among those that a cut leaves: F would make other queries of them."""
    with pytest.raises(FocusConfigError, match=r"`global_rotation` got 0\.5"):
        FocusConfig(feedback_through="keys", global_rotation=0.5)
