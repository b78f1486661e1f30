"""`feedback_through="layer"`: F of a head is what the layer's own projections make of its output, as they now are."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from tiny import SETTINGS, TINY, logits, make_inputs, patched, randomize, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_focus import FocusA, FocusConfig, apply_focus, fold_feedback, remove_focus
from hf_focus.branch import FocusBranch
from hf_focus.errors import FocusConfigError, NotPatchedError
from hf_focus.projections import find_projections, layer_feedback, through_layer

THROUGH_LAYER = FocusConfig.build(SETTINGS, feedback_through="layer")
SEPARATE = ["llama", "gemma2", "opt", "whisper", "t5", "distilbert"]
FUSED = ["phi3", "gpt2", "gpt_neox", "bert"]


def branches(model: nn.Module) -> dict[str, tuple[nn.Module, FocusBranch]]:
    """Attention module and branch by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, FocusBranch)}
    return {path: (model.get_submodule(path.removesuffix(".focus")), branch) for path, branch in found.items()}


class Feedback(nn.Module):
    """`through_layer` of an attention module, as a module that can be called with other weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self) -> torch.Tensor:
        return through_layer(self.attention, num_heads=4, head_dim=8, value_head_dim=8)


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """With FocusA of random weights, and projections whose product counts beside the learned difference."""
    with torch.no_grad():
        for attention, branch in branches(model).values():
            for weight in find_projections(attention, branch.num_heads, branch.head_dim, branch.value_head_dim):
                weight.mul_(20)
    return randomize(model)


def test_it_is_the_query_that_the_layer_makes_of_what_a_head_writes() -> None:
    attention = TINY["llama"].build().double().model.layers[0].self_attn
    output = torch.randn(4, 5, 8, dtype=torch.double)
    matrix = through_layer(attention, num_heads=4, head_dim=8, value_head_dim=8)
    for head in range(4):
        # All other heads are silent; the projections know nothing of FocusA
        stream = torch.zeros(5, 32, dtype=torch.double)
        stream[:, 8 * head : 8 * head + 8] = output[head]
        query = attention.q_proj(attention.o_proj(stream)).unflatten(-1, (4, 8))[:, head]
        torch.testing.assert_close(output[head] @ matrix[head], query)


@pytest.mark.parametrize("name", SEPARATE)
def test_the_untrained_patch_changes_nothing(name: str) -> None:
    model, inputs = TINY[name].build(), make_inputs(name)
    before = logits(model, **inputs)
    apply_focus(model, THROUGH_LAYER)
    torch.testing.assert_close(logits(model, **inputs), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SEPARATE)
def test_folding_keeps_the_outputs_and_takes_the_projections_out_of_the_call(name: str) -> None:
    model, inputs = lively(apply_focus(TINY[name].build(), THROUGH_LAYER)), make_inputs(name)
    features = lively(apply_focus(TINY[name].build(), SETTINGS))
    expected = logits(model, **inputs)
    assert (expected - logits(features, **inputs)).abs().max() > 1e-3
    assert fold_feedback(model) is model
    assert model.config.focus_config["feedback_through"] == "features"
    assert all(layer_feedback(*pair) is None for pair in branches(model).values())
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_folded_model_is_saved_as_such(tmp_path: Path) -> None:
    model = fold_feedback(lively(apply_focus(TINY["llama"].build(), THROUGH_LAYER)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.focus_config == FocusConfig.build(THROUGH_LAYER, feedback_through="features")
    torch.testing.assert_close(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()), rtol=0, atol=0)


def test_folding_twice_or_without_need_does_nothing() -> None:
    model = patched("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fold_feedback(fold_feedback(model))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_it_is_saved_as_the_setting_and_the_difference(tmp_path: Path) -> None:
    model = lively(apply_focus(TINY["llama"].build(), THROUGH_LAYER))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.focus_config.feedback_through == "layer"
    torch.testing.assert_close(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()), rtol=0, atol=0)
    # With the projections moved, F has moved too
    with torch.no_grad():
        for attention, branch in branches(loaded).values():
            before = layer_feedback(attention, branch)
            attention.q_proj.weight.mul_(2)
            torch.testing.assert_close(layer_feedback(attention, branch), 2 * before)


def test_the_projections_learn_through_the_iteration() -> None:
    """The gradients through F, of both projections, are those that finite differences find, in float64."""
    generator = torch.Generator().manual_seed(0)
    attention = TINY["llama"].build().double().model.layers[0].self_attn
    branch = FocusBranch(FocusConfig.build(THROUGH_LAYER, refiner=False), num_heads=4, head_dim=8, value_head_dim=8)
    randomize(nn.ModuleDict({"focus": branch.double()}))
    query, key, value = torch.randn(3, 1, 4, 6, 8, dtype=torch.double, generator=generator)

    def local(query_weight: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
        projections = {"q_proj.weight": query_weight, "o_proj.weight": output_weight}
        matrix = torch.func.functional_call(Feedback(attention), {f"attention.{k}": v for k, v in projections.items()})
        return branch.attend(query, key, value, value.transpose(1, 2), layer_feedback=matrix)

    weights = [torch.randn(32, 32, dtype=torch.double, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(local, weights, fast_mode=True)


@pytest.mark.parametrize("name", FUSED)
def test_a_layer_without_projections_of_its_own_is_refused_before_any_change(name: str) -> None:
    model = TINY[name].build()
    before = type(model), {key: id(x) for key, x in model.state_dict(keep_vars=True).items()}
    with pytest.raises(
        FocusConfigError, match=r"`feedback_through` got 'layer'; accepted: 'features' for \w+: .*q_proj"
    ):
        apply_focus(model, THROUGH_LAYER)
    assert before == (type(model), {key: id(x) for key, x in model.state_dict(keep_vars=True).items()})


@pytest.mark.parametrize("shape", [(512, 1), (32, 32)], ids=["4 bit", "8 bit"])
def test_projections_quantized_after_the_patch_are_refused_by_name(shape: tuple[int, int]) -> None:
    model = apply_focus(TINY["llama"].build(), THROUGH_LAYER)
    # 4-bit weights are packed, two in a byte; 8-bit ones have the shape of the plain ones
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(FocusConfigError, match=r"'layer'.*LlamaAttention.*before you quantize"):
        fold_feedback(model)
    assert model.focus_config.feedback_through == "layer"


def test_offloaded_weights_are_refused_by_name_and_nothing_is_folded() -> None:
    model = lively(apply_focus(TINY["llama"].build(), THROUGH_LAYER))
    first = model.model.layers[0].self_attn.focus.feedback_matrix.clone()
    model.model.layers[1].to("meta")
    with pytest.raises(FocusConfigError, match=r"'layer'.*before you offload"):
        fold_feedback(model)
    assert torch.equal(model.model.layers[0].self_attn.focus.feedback_matrix, first)
    assert model.focus_config.feedback_through == "layer"


def test_what_lora_adds_to_the_projections_counts_before_and_after_merging() -> None:
    model = lively(apply_focus(TINY["llama"].build(), THROUGH_LAYER))
    inputs = {"input_ids": tokens()}
    plain = logits(model, **inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    attention, branch = next(iter(branches(model).values()))
    merged = layer_feedback(attention, branch).clone()
    expected = logits(adapted, **inputs)
    assert (expected - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, **inputs), plain)
        assert (layer_feedback(attention, branch) - merged).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted.merge_and_unload(), **inputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer_feedback(attention, branch), merged, rtol=1e-4, atol=1e-5)


def test_dora_is_refused_by_name() -> None:
    model = apply_focus(TINY["llama"].build(), THROUGH_LAYER)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(FocusConfigError, match=r"'layer'.*DoRA"):
        adapted(input_ids=tokens())


@pytest.mark.parametrize("kind", [IA3Config, LoHaConfig])
def test_adapters_whose_effect_cannot_be_told_are_refused(kind: type[PeftConfig]) -> None:
    model = apply_focus(TINY["llama"].build(), THROUGH_LAYER)
    extra = {"feedforward_modules": []} if kind is IA3Config else {}
    adapted = get_peft_model(model, kind(target_modules=["q_proj"], **extra))
    with pytest.raises(FocusConfigError, match=r"'layer'.*PEFT"):
        adapted(input_ids=tokens())


def test_a_single_pass_feeds_nothing_back() -> None:
    apply_focus(TINY["gpt2"].build(), FocusConfig.build(THROUGH_LAYER, max_iterations=1))
    model = apply_focus(TINY["llama"].build(), FocusConfig.build(THROUGH_LAYER, max_iterations=1))
    assert all(layer_feedback(*pair) is None for pair in branches(model).values())
    assert fold_feedback(model).focus_config.feedback_through == "features"


def test_what_cannot_be_folded() -> None:
    with pytest.raises(NotPatchedError):
        fold_feedback(TINY["llama"].build())


def test_the_layer_alone_has_no_projection_to_go_through() -> None:
    with pytest.raises(FocusConfigError, match="`feedback_through` got 'layer'; accepted: 'features'"):
        FocusA(dims=32, heads=4, feedback_through="layer")


def test_removed_is_the_original() -> None:
    model, inputs = TINY["llama"].build(), {"input_ids": tokens()}
    before = logits(model, **inputs)
    assert torch.equal(logits(remove_focus(apply_focus(model, THROUGH_LAYER)), **inputs), before)


@pytest.mark.slow
def test_training_steps_compile_as_one_graph() -> None:
    model = lively(apply_focus(TINY["llama"].build(num_hidden_layers=1), THROUGH_LAYER))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        logits(compiled, input_ids=tokens()), logits(model, input_ids=tokens()), rtol=1e-4, atol=1e-5
    )
