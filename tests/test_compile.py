"""`torch.compile(fullgraph=True)` of a patched model: no graph break, the same results."""

import copy

import pytest
import torch
from test_architectures import no_dropout
from tiny import logits, patched, tokens
from transformers import StaticCache

from hf_focus import focus_attention

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_forward(name: str) -> None:
    model, ids = patched(name), tokens()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=0, atol=1e-6)


def test_without_memory() -> None:
    """On the meta device, as exporters trace."""
    query, span = torch.empty(1, 2, 5, 4, device="meta"), torch.empty(1, 2, 5, device="meta")
    compiled = torch.compile(
        lambda query, span: focus_attention(query, query, query, span, backend="reference").output,
        fullgraph=True,
        backend=BACKEND,
    )
    assert compiled(query, span).shape == query.shape


def test_decode_step() -> None:
    model, ids = patched("llama", num_hidden_layers=1), tokens(2, 12)
    step = torch.compile(model.forward, fullgraph=True, backend=BACKEND)
    results = []
    for forward in (model.forward, step):
        cache = StaticCache(config=model.config, max_cache_len=24)
        with torch.no_grad():
            steps = [model(input_ids=ids, past_key_values=cache).logits[:, -1:]]
            for _ in range(8):
                steps.append(forward(input_ids=steps[-1].argmax(-1), past_key_values=cache).logits)
        results.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reward", ["mass", "seed", "loss"])
def test_training_step(reward: str) -> None:
    model, ids = no_dropout(patched("llama", num_hidden_layers=1, reward=reward)), tokens()
    for module in model.modules():
        if hasattr(module, "epsilon"):
            # A compiled graph draws other random actions
            module.epsilon = 0.0
    start, results = copy.deepcopy(model.state_dict()), []
    for forward in (model, torch.compile(model, fullgraph=True, backend=BACKEND)):
        model.load_state_dict(start)
        model.zero_grad()
        # The second pass accumulates: another graph, in which the refiner's step goes on
        for inputs in (ids, tokens(seed=1)):
            forward(input_ids=inputs, labels=inputs).loss.backward()
        gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        state = {key: value.clone() for key, value in model.state_dict().items() if key not in gradients}
        results.append({**gradients, **state})
    eager, compiled = results
    assert any(key.endswith("refiner.num_updates") and value == 1 for key, value in compiled.items())
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-7, msg=key)
