"""`apply_focus` and `remove_focus`: what they refuse, and that refusing changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import SETTINGS, TINY, logits, make_inputs, patched, tokens
from torch import nn
from transformers import (
    BartConfig,
    CohereConfig,
    CohereForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetModel,
)

import hf_focus
from hf_focus import FocusConfig, apply_focus, focus_model_class, record_focus, register_architecture, remove_focus
from hf_focus.architecture import _ARCHITECTURES, find_architecture
from hf_focus.errors import (
    AlreadyPatchedError,
    FocusConfigError,
    FocusError,
    NoMatchingLayerError,
    NotPatchedError,
    UnsupportedArchitectureError,
)


def xlnet() -> PreTrainedModel:
    return XLNetModel(XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=32, vocab_size=99))


def falcon_mamba() -> PreTrainedModel:
    return FalconMambaForCausalLM(FalconMambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=99))


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], type[FocusError], str]] = {
    "attention out of reach": (
        xlnet,
        {},
        UnsupportedArchitectureError,
        r"XLNetModel of model type 'xlnet'.*\(XLNetRelativeAttention\) does not call.*AttentionInterface.*register",
    ),
    "no attention": (falcon_mamba, {}, UnsupportedArchitectureError, "'falcon_mamba'.* it has no self-attention"),
    "modules that do not exist": (
        TINY["bart"].build,
        {"modules": "vision"},
        NoMatchingLayerError,
        "`modules` got 'vision'; accepted: .*model.encoder.layers.0.self_attn, model.decoder.layers.0.self_attn",
    ),
    "modules that are no pattern": (TINY["llama"].build, {"modules": "("}, FocusConfigError, "`modules` got '\\('"),
    "layer that does not exist": (
        TINY["llama"].build,
        {"layers": [0, 2]},
        NoMatchingLayerError,
        r"\[2\] do not exist",
    ),
    "value out of range": (
        TINY["llama"].build,
        {"max_span": 0},
        FocusConfigError,
        "`max_span` got 0; accepted: an int >= 1",
    ),
    "wrong type": (TINY["llama"].build, {"max_span": "8"}, FocusConfigError, "`max_span` got '8'"),
    "unknown setting": (TINY["llama"].build, {"span": 8}, FocusConfigError, "got 'span'; accepted: .*max_span"),
    "config of another kind": (TINY["llama"].build, {"config": 3}, FocusConfigError, "`config` got 3"),
    "a mean over the future": (
        TINY["llama"].build,
        {"span_granularity": "sequence"},
        FocusConfigError,
        "`span_granularity` got 'sequence'; accepted: 'token'",
    ),
    "a mean over the decoder's future": (
        TINY["bart"].build,
        {"span_granularity": "window"},
        FocusConfigError,
        "decoder.layers.0.self_attn",
    ),
    "patched twice": (lambda: patched("llama"), {}, AlreadyPatchedError, "remove_focus"),
    "no transformers model": (lambda: nn.Linear(2, 2), {}, FocusConfigError, "`model` got 'Linear'"),
    "wrapped model": (lambda: torch.compile(TINY["llama"].build()), {}, FocusConfigError, "before wrapping"),
    "attention it cannot wrap": (
        lambda: TINY["llama"].build(attn_implementation="flex_attention"),
        {},
        FocusConfigError,
        "`attn_implementation` got 'flex_attention'; accepted: 'sdpa' or 'eager'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_before_anything_is_changed(case: str) -> None:
    build, settings, error, message = REFUSED[case]
    model = build()
    attributes = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        apply_focus(model, **settings)
    assert attributes == {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_remove_needs_a_patched_model() -> None:
    with pytest.raises(NotPatchedError, match="`model` got 'LlamaForCausalLM'"):
        remove_focus(TINY["llama"].build())


def test_remove_from_a_model_built_as_focus() -> None:
    model = focus_model_class(LlamaForCausalLM)(TINY["llama"].build_config()).eval()
    assert remove_focus(model) is model
    assert type(model) is LlamaForCausalLM
    assert type(model.model).__name__ == "LlamaModel"
    assert model.config.model_type == "llama"
    assert not any("focus" in key for key in model.state_dict())


def test_patch_again_after_removal() -> None:
    model, inputs = patched("llama"), make_inputs("llama")
    apply_focus(remove_focus(model), FocusConfig(max_span=3))
    assert model.focus_config.max_span == 3
    torch.testing.assert_close(logits(model, **inputs), logits(TINY["llama"].build(), **inputs), rtol=0, atol=1e-5)


def test_settings_replace_those_of_the_config() -> None:
    model = apply_focus(TINY["llama"].build(), FocusConfig(max_span=5, ramp=2), ramp=1)
    assert (model.focus_config.max_span, model.focus_config.ramp) == (5, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_branch_follows_its_layer(training: bool, dtype: torch.dtype) -> None:
    model = apply_focus(TINY["llama"].build().to(dtype).train(training), SETTINGS)
    for name, module in model.named_modules():
        if ".focus" in name:
            assert module.training is training
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for name, b in model.named_buffers() if ".focus." in name)


def test_patching_is_deterministic() -> None:
    states = []
    for _ in range(2):
        model = TINY["llama"].build()
        torch.rand(7)
        states.append(apply_focus(model, SETTINGS).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_inner_models_that_cannot_be_patched() -> None:
    """T5's stacks have configs of their own: one of them must not be found out too late."""
    model = TINY["t5"].build()
    model.encoder.set_attn_implementation("flex_attention")
    classes = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    with pytest.raises(FocusConfigError, match="flex_attention"):
        apply_focus(model, SETTINGS)
    assert classes == {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    assert model.config.model_type == "t5"


@pytest.mark.parametrize("had", ["sdpa", "eager"])
@pytest.mark.parametrize("chosen", ["sdpa", "eager", None])
def test_removal_restores_the_attention_that_was_replaced(had: str, chosen: str | None) -> None:
    model = TINY["t5"].build(attn_implementation=had)
    apply_focus(model, SETTINGS, global_attn_implementation=chosen)
    assert model.config._attn_implementation == f"focus|{chosen or had}"
    assert "focus_replaced_attention" not in model.config.to_dict()
    remove_focus(model)
    assert {module.config._attn_implementation for module in (model, model.encoder, model.decoder)} == {had}


def test_patching_draws_no_random_numbers() -> None:
    model = TINY["llama"].build()
    state = torch.get_rng_state()
    apply_focus(model, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", [None, 1.25])
def test_offloaded_models(start: float | None) -> None:
    accelerate = pytest.importorskip("accelerate")
    settings = FocusConfig.build(SETTINGS, global_exponent_start=start)
    model, plain = patched("llama", settings), logits(patched("llama", settings), input_ids=tokens())
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model, input_ids=tokens()), plain, rtol=0, atol=1e-6)
    unpatched = TINY["llama"].build()
    accelerate.cpu_offload(unpatched, execution_device="cpu")
    with pytest.raises(FocusConfigError, match="patch before offloading"):
        apply_focus(unpatched, SETTINGS)


def test_lora_on_all_linear_layers_takes_only_the_bases() -> None:
    peft = pytest.importorskip("peft")
    model, ids = patched("llama"), tokens()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert not any("focus" in name for name, _ in wrapped.named_parameters() if "lora" in name)
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if p.requires_grad)
    # What is frozen is not saved: nothing of it may move
    assert all(torch.equal(tables[name], buffer) for name, buffer in model.named_buffers())
    before = logits(wrapped.eval(), input_ids=ids)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, input_ids=ids), before, rtol=0, atol=1e-5)


def test_removal_under_a_peft_wrapper_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = patched("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["focus"]))
    with pytest.raises(FocusConfigError, match="unload the adapter first"):
        remove_focus(model)
    with record_focus(model) as records:
        model(input_ids=tokens())
    assert {name: len(calls) for name, calls in records.layers.items()} == {
        "model.layers.0.self_attn": 1,
        "model.layers.1.self_attn": 1,
    }


@pytest.fixture
def architectures() -> Any:
    kept = dict(_ARCHITECTURES)
    yield
    _ARCHITECTURES.clear()
    _ARCHITECTURES.update(kept)


class OddAttention(CohereForCausalLM):
    """A model whose attention names its sizes as no other does."""

    def __init__(self, config: CohereConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.features = layer.self_attn.__dict__.pop("head_dim")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.model.layers:
            layer.self_attn.head_dim = 8
        try:
            return super().forward(*args, **kwargs)
        finally:
            for layer in self.model.layers:
                del layer.self_attn.head_dim


@pytest.mark.usefixtures("architectures")
def test_registering_an_architecture() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "head_dim": 8}
    model = OddAttention(CohereConfig(**sizes, intermediate_size=48, pad_token_id=0)).eval()
    del model.config.head_dim
    before = logits(model, input_ids=tokens())
    apply_focus(model, SETTINGS)
    with pytest.raises(UnsupportedArchitectureError, match=r"\(4, 8, 8\), and FocusA was built for \(4, 9, 9\)"):
        model(input_ids=tokens())
    remove_focus(model)
    register_architecture("cohere", attention="CohereAttention", head_dim="features")
    assert "cohere" in hf_focus.supported_architectures()
    apply_focus(model, SETTINGS)
    with record_focus(model) as records:
        torch.testing.assert_close(logits(model, input_ids=tokens()), before, rtol=0, atol=1e-5)
    assert len(records) == 2
    assert model.config.focus_architecture["head_dim"] == "features"


@pytest.mark.usefixtures("architectures")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, FocusConfigError, "`attention` got None"),
        ({"attention": []}, FocusConfigError, r"`attention` got \[\]"),
        ({"attention": "A", "exclude": "("}, FocusConfigError, "`exclude` got"),
        ({"attention": "A", "num_heads": 3}, FocusConfigError, "`num_heads` got 3"),
        ({"attention": "A", "heads": 3}, FocusConfigError, "`focus_architecture` got"),
    ],
)
def test_bad_declarations(settings: dict[str, Any], error: type[FocusError], message: str) -> None:
    with pytest.raises(error, match=message):
        register_architecture("mine", **settings)


@pytest.mark.usefixtures("architectures")
def test_declaration_that_fits_nothing() -> None:
    register_architecture("llama", attention="LlamaAttentions")
    with pytest.raises(UnsupportedArchitectureError, match="LlamaAttentions"):
        apply_focus(TINY["llama"].build())
    register_architecture("llama", attention="LlamaAttention", num_heads="heads")
    with pytest.raises(UnsupportedArchitectureError, match="`num_heads` got 'heads'"):
        apply_focus(TINY["llama"].build())


@pytest.mark.usefixtures("architectures")
def test_wrong_sizes_are_named_when_the_model_runs() -> None:
    model = TINY["llama"].build()
    model.config.wrong = 8
    register_architecture("llama", attention="LlamaAttention", num_heads="wrong")
    apply_focus(model, SETTINGS)
    with pytest.raises(UnsupportedArchitectureError, match=r"\(4, 8, 8\), and FocusA was built for \(8, 8, 8\)"):
        model(input_ids=tokens())


def test_cross_attention_stays() -> None:
    model = patched("bart")
    focused = [path for path, _ in model.named_modules() if path.endswith(".focus")]
    assert len(focused) == 4
    assert not any("encoder_attn" in path for path in focused)
    assert isinstance(model.config, BartConfig)
    assert find_architecture("bart") is None
    assert model.config.focus_architecture["attention"] == ["BartAttention"]
