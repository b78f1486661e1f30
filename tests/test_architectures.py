"""The properties of a patched model, over every supported architecture."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CAUSAL_LMS, DECODERS, ENCODERS, LENGTH, PAD, SETTINGS, TINY, logits, make_inputs, patched, tokens
from transformers import AutoConfig, PreTrainedModel

from hf_focus import FocusConfig, apply_focus, focus_model_class, record_focus, remove_focus, supported_architectures

TOLERANCE = {"rtol": 0, "atol": 1e-5}
# More than the span: the last local attention sees nothing of the prompt
GREEDY = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
every_architecture = pytest.mark.parametrize("name", TINY)


def no_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Training mode without noise."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    if "input_ids" in inputs and "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, **{**GREEDY, **settings})


def test_every_tested_architecture_is_supported() -> None:
    assert set(TINY) <= set(supported_architectures())


@every_architecture
def test_untrained_patch_changes_nothing(name: str) -> None:
    model, inputs = TINY[name].build(), make_inputs(name)
    before = logits(model, **inputs)
    text = generate(model, inputs) if TINY[name].is_decoder else None
    apply_focus(model, SETTINGS)
    torch.testing.assert_close(logits(model, **inputs), before, **TOLERANCE)
    if text is not None:
        assert torch.equal(generate(model, inputs), text)


@every_architecture
def test_patch_reaches_every_self_attention(name: str) -> None:
    model, inputs = patched(name), make_inputs(name)
    with record_focus(model) as records:
        acting = logits(model, **inputs)
    stacks = 2 if TINY[name].eats in ("seq2seq", "speech") else 1
    assert len(records) == 2 * stacks
    assert all(len(calls) == 1 for calls in records.layers.values())
    assert not torch.allclose(acting, logits(TINY[name].build(), **inputs), atol=1e-4)


@every_architecture
def test_removal_leaves_nothing(name: str) -> None:
    model, inputs = TINY[name].build(), make_inputs(name)
    before, state = logits(model, **inputs), copy.deepcopy(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    config = model.config.to_dict(), type(model.config), model.config._attn_implementation
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    remove_focus(apply_focus(model, SETTINGS))
    assert classes == {path: type(module) for path, module in model.named_modules()}
    assert config == (model.config.to_dict(), type(model.config), model.config._attn_implementation)
    assert attributes == {path: set(vars(module)) for path, module in model.named_modules()}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(before, logits(model, **inputs))


@every_architecture
def test_other_models_are_not_touched(name: str) -> None:
    config = TINY[name].build_config()
    model_class = type(TINY[name].build())
    torch.manual_seed(0)
    one, other = model_class(config).eval(), model_class(config).eval()
    before = logits(other, **make_inputs(name))
    apply_focus(one, SETTINGS)
    assert type(other) is model_class
    assert type(other.config) is type(TINY[name].build_config())
    assert "focus_config" not in other.config.to_dict()
    assert other.config._attn_implementation != one.config._attn_implementation
    assert torch.equal(before, logits(other, **make_inputs(name)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", DECODERS)
def test_strictly_causal(name: str, training: bool) -> None:
    model, inputs = patched(name), make_inputs(name)
    if training:
        no_dropout(model)
    ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    changed = inputs[ids].clone()
    position = LENGTH // 2
    changed[:, position] = (changed[:, position] + 1 - 3) % 90 + 3
    torch.manual_seed(5)
    before = logits(model, **inputs)
    torch.manual_seed(5)
    after = logits(model, **{**inputs, ids: changed})
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position:], after[:, position:], atol=1e-4)


def padded(ids: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right), value=0)
    return {"input_ids": torch.nn.functional.pad(ids, (left, right), value=PAD), "attention_mask": mask}


@pytest.mark.parametrize(("left", "right"), [(0, 5), (5, 0), (3, 9)])
@pytest.mark.parametrize("name", CAUSAL_LMS + ENCODERS)
def test_padding_does_not_matter(name: str, left: int, right: int) -> None:
    model, ids = patched(name), tokens(1, 12)
    inputs = padded(ids, left, right)
    if name == "distilbert" and left:
        pytest.skip("DistilBERT takes no positions, and counts them from the padding on: the plain model differs too")
    if name != "distilbert":
        first = 1 + PAD if name == "roberta" else 0
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0) + first
    alone = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    # Beside a longer sequence, as in a batch
    other = tokens(1, 12 + left + right, seed=7)
    batch = {key: value.repeat(2, 1) for key, value in inputs.items()}
    batch["input_ids"][1], batch["attention_mask"][1] = other[0], 1
    if "position_ids" in batch:
        batch["position_ids"][1] = torch.arange(other.shape[1]) + first
    result = logits(model, **batch)[:1, left : left + 12]
    torch.testing.assert_close(result, alone, **TOLERANCE)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_packed_is_separate(name: str) -> None:
    if name == "opt":
        pytest.skip("OPT makes its positions from the attention mask")
    model = patched(name)
    parts = [tokens(1, 9, seed=1), tokens(1, 14, seed=2)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = logits(model, input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False)
    separate = torch.cat([logits(model, input_ids=part) for part in parts], dim=1)
    torch.testing.assert_close(packed, separate, **TOLERANCE)


@pytest.mark.parametrize("never", [torch.finfo(torch.float32).min, float("-inf"), -1e9, -1e4])
@pytest.mark.parametrize("chunked", [False, True])
def test_masks_of_ones_own(never: float, chunked: bool) -> None:
    """A 4D mask hides the same keys in whatever way it says so, and a second chunk finds its place by it."""
    model, ids = patched("llama"), tokens(1, LENGTH)
    visible = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[..., :3] = False
    visible[:, :, :3, :3] = torch.eye(3, dtype=torch.bool)
    positions = torch.arange(LENGTH)[None]
    expected = logits(model, input_ids=ids, attention_mask=visible, position_ids=positions)
    mask = torch.zeros(visible.shape).masked_fill(~visible, never)
    if not chunked:
        result = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    else:
        half = LENGTH // 2
        with torch.no_grad():
            first = model(input_ids=ids[:, :half], attention_mask=mask[:, :, :half, :half], use_cache=True)
            cache = first.past_key_values
            rest = model(input_ids=ids[:, half:], attention_mask=mask[:, :, half:], past_key_values=cache)
        result = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static", "chunked", "beams", "static beams", "left padding"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_is_uncached(name: str, cache: str) -> None:
    model, inputs = patched(name), make_inputs(name)
    settings: dict[str, Any] = {}
    if "beams" in cache:
        settings["num_beams"] = 3
    if cache == "left padding" and TINY[name].eats == "text":
        inputs = padded(inputs["input_ids"], 4, 0)
        inputs["input_ids"][1], inputs["attention_mask"][1] = tokens(1, LENGTH + 4, seed=4)[0], 1
    uncached = generate(model, inputs, use_cache=False, **settings)
    if "static" in cache:
        settings["cache_implementation"] = "static"
    if cache == "chunked":
        settings["prefill_chunk_size"] = 8
    if cache == "chunked" and TINY[name].eats != "text":
        pytest.skip("the decoder's prompt is one token")
    assert torch.equal(generate(model, inputs, **settings), uncached)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_token_by_token_logits(name: str, qk_norm: bool) -> None:
    model, ids = patched(name, replace(SETTINGS, qk_norm=qk_norm)), tokens(2, LENGTH)
    whole = logits(model, input_ids=ids)
    cache, steps = None, []
    for position in range(LENGTH):
        with torch.no_grad():
            output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **TOLERANCE)


@every_architecture
def test_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = patched(name), make_inputs(name)
    before, state = logits(model, **inputs), model.state_dict()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"focus_{name}"
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.focus_config == model.focus_config
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert not loaded.training
    assert torch.equal(before, logits(loaded, **inputs))


@every_architecture
def test_plain_checkpoint_loads_and_back(name: str, tmp_path: Path) -> None:
    plain, inputs = TINY[name].build(), make_inputs(name)
    plain.save_pretrained(tmp_path / "plain")
    model = focus_model_class(type(plain)).from_pretrained(tmp_path / "plain", focus_config=SETTINGS)
    assert model.focus_config == SETTINGS
    fresh = apply_focus(TINY[name].build(), SETTINGS).state_dict()
    assert fresh.keys() == model.state_dict().keys()
    assert all(torch.equal(fresh[key], value) for key, value in model.state_dict().items())
    assert torch.equal(logits(plain, **inputs), logits(model, **inputs))
    model.save_pretrained(tmp_path / "focus")
    back = type(plain).from_pretrained(tmp_path / "focus")
    assert torch.equal(logits(plain, **inputs), logits(back, **inputs))


def gradients(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(6)
    model(**inputs).logits.square().mean().backward()
    return {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_of_ours_learns(name: str, dtype: torch.dtype) -> None:
    model = no_dropout(patched(name)).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make_inputs(name).items()}
    for key, grad in gradients(model, inputs).items():
        if ".focus." in key:
            assert grad is not None, key
            assert grad.isfinite().all(), key
            assert grad.abs().max() > 0, key


@every_architecture
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    # In float64, where rounding does not move a statistic of the refiner over the edge of its bin
    model = no_dropout(patched(name)).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make_inputs(name).items()}
    assert model.supports_gradient_checkpointing
    start = copy.deepcopy(model.state_dict())
    plain, tables = gradients(model, inputs), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Without it reentrant checkpointing of the first layer has no gradient, as in any model
        model.enable_input_require_grads()
    checkpointed = gradients(model, inputs)
    for key, grad in plain.items():
        if grad is not None and not (reentrant and checkpointed[key] is None and ".focus." not in key):
            torch.testing.assert_close(checkpointed[key], grad, rtol=1e-8, atol=1e-10, msg=key)
    for key, buffer in model.state_dict().items():
        torch.testing.assert_close(buffer, tables[key], rtol=1e-5, atol=1e-6, msg=key)
        if key.endswith("num_updates"):
            assert buffer.item() == start[key].item() + 1


@every_architecture
def test_eval_is_deterministic_and_changes_no_buffer(name: str) -> None:
    model, inputs = patched(name), make_inputs(name)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    first = model(**inputs).logits
    first.sum().backward()
    assert torch.equal(first, model(**inputs).logits)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


@every_architecture
def test_hidden_states_and_attentions_are_still_returned(name: str) -> None:
    model, inputs = TINY[name].build(attn_implementation="eager"), make_inputs(name)
    asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        before, after = model(**asked), apply_focus(model, SETTINGS)(**asked)
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith(("hidden_states", "attentions")):
            torch.testing.assert_close(after[key], before[key], **TOLERANCE)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_layers_choose_what_is_patched(name: str) -> None:
    model = apply_focus(TINY[name].build(), SETTINGS, layers=[1])
    paths = [path for path, _ in model.named_modules() if path.endswith(".focus")]
    assert len(paths) == 1
    assert ".1." in paths[0]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_global_attention_can_be_chosen(name: str, implementation: str, tmp_path: Path) -> None:
    model, inputs = patched(name), make_inputs(name)
    before = logits(model, **inputs)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == f"focus|{implementation}"
    torch.testing.assert_close(logits(model, **inputs), before, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.config._attn_implementation == f"focus|{implementation}"
    torch.testing.assert_close(logits(loaded, **inputs), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_max_dist_limits_the_global_branch(name: str) -> None:
    """Beyond `max_dist` of every layer, only the sinks reach a token."""
    settings = FocusConfig(max_span=3, ramp=1, max_dist=4, sink_tokens=2, max_iterations=2)
    model, ids = patched(name, settings), tokens(1, LENGTH)
    before = logits(model, input_ids=ids)
    for position, reaches in ((8, False), (1, True), (LENGTH - 3, True)):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] - 2) % 90 + 3
        # Two layers, three tokens each
        assert torch.equal(before[0, -1], logits(model, input_ids=changed)[0, -1]) != reaches
