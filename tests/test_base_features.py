"""What a base model supports in transformers, its patched model supports too: devices, export, embeddings, plans."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SETTINGS, TINY, VOCAB, logits, make_inputs, patched, randomize, tokens
from transformers import GPTJConfig, GPTJForCausalLM, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from hf_focus import FocusConfig, apply_focus, focus_model_class, remove_focus
from hf_focus.errors import UnsupportedArchitectureError
from hf_focus.problem import without_autocast

KINDS = ("llama", "bert", "t5", "vit")


def gptj() -> PreTrainedModel:
    """A model whose attention does not call the interface."""
    torch.manual_seed(0)
    config = GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=VOCAB, n_positions=64, n_inner=48)
    return GPTJForCausalLM(config).eval()


def llava() -> PreTrainedModel:
    """A model of two others."""
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    text = {"model_type": "llama", **TINY["llama"].sizes}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def picture_and_text() -> dict[str, torch.Tensor]:
    ids = tokens(2, 12).clamp(max=90)
    ids[:, 2:6] = 98
    return {"input_ids": ids, "pixel_values": make_inputs("vit", 2)["pixel_values"]}


def parent_of(name: str) -> str:
    parent = name.rpartition(".")[0]
    return f"{parent}." if parent else ""


@pytest.mark.parametrize(("name", "start"), [*((name, None) for name in KINDS), ("llama", 1.25)])
def test_parts_on_disk(name: str, start: float | None, tmp_path: Path) -> None:
    """A device map with a layer on the disk: the branch goes with its layer, and comes back for the forward."""
    pytest.importorskip("accelerate")
    model = patched(name, FocusConfig.build(SETTINGS, global_exponent_start=start))
    inputs = make_inputs(name)
    model.save_pretrained(tmp_path / "model")
    path = next(
        p
        for p, m in model.named_modules()
        if p.endswith(".1") and any(n.endswith(".focus") for n, _ in m.named_modules())
    )
    placed = {path: "disk"} | {
        name: "cpu"
        for name, _ in model.named_modules()
        if name and not path.startswith(f"{name}.") and name != path and path.startswith(parent_of(name))
    }
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=placed, offload_folder=str(tmp_path / "disk"))
    away = {key for key, parameter in loaded.named_parameters() if parameter.is_meta}
    assert any(".focus." in key for key in away)
    torch.testing.assert_close(logits(loaded, **inputs), logits(model, **inputs), rtol=0, atol=1e-6)


def test_device_map_auto(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for model, inputs in ((patched("llama"), make_inputs("llama")), (focused(gptj()), {"input_ids": tokens()})):
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = type(model).from_pretrained(tmp_path / type(model).__name__, device_map="auto")
        torch.testing.assert_close(logits(loaded, **inputs), logits(model, **inputs), rtol=0, atol=1e-6)


def focused(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    return randomize(apply_focus(model, SETTINGS, **settings))


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_export(name: str) -> None:
    model, inputs = patched(name), make_inputs(name)
    if name == "llama":
        inputs["use_cache"] = False
    program = torch.export.export(model, (), inputs, strict=False)
    with torch.no_grad():
        exported = program.module()(**inputs)
    torch.testing.assert_close(exported.logits, logits(model, **inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_keeps_its_precision_under_autocast(strict: bool) -> None:
    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with without_autocast(x):
                return x @ x

    exported = torch.export.export(Product(), (torch.eye(3),), strict=strict).module()
    with torch.autocast("cpu", torch.bfloat16):
        assert exported(torch.eye(3)).dtype == torch.float32


def test_quantized_base_weights() -> None:
    """Linear layers in int8, FocusA in float32: the outputs follow the unquantized model's."""
    model, ids = patched("llama"), tokens()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantized.model.layers[0].self_attn.q_proj).__module__
    exact, rounded = logits(model, input_ids=ids), logits(quantized, input_ids=ids)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_plans_are_the_bases() -> None:
    model = TINY["llama"].build()
    plans = model._tp_plan, model._pp_plan, model._no_split_modules, model.config.base_model_tp_plan
    apply_focus(model, SETTINGS)
    assert plans == (model._tp_plan, model._pp_plan, model._no_split_modules, model.config.base_model_tp_plan)


def test_heads_split_among_devices_are_refused() -> None:
    model = patched("llama")
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[: len(layer.weight) // 2].detach())
    with pytest.raises(UnsupportedArchitectureError, match="tensor parallelism"):
        model(input_ids=tokens())


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_embeddings_are_resized(name: str, tmp_path: Path) -> None:
    plain, model = TINY[name].build(), apply_focus(TINY[name].build(), SETTINGS)
    for each in (plain, model):
        torch.manual_seed(1)
        each.resize_token_embeddings(VOCAB + 7)
    inputs = make_inputs(name)
    assert torch.equal(logits(model, **inputs), logits(plain, **inputs))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vocab_size == VOCAB + 7
    assert torch.equal(logits(loaded, **inputs), logits(plain, **inputs))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tied_weights_stay_tied(name: str, tmp_path: Path) -> None:
    model = apply_focus(TINY[name].build(tie_word_embeddings=True), SETTINGS)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded, remove_focus(model)):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_embeddings_as_inputs(name: str) -> None:
    model, ids = patched(name), tokens()
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        logits(model, inputs_embeds=embeddings), logits(model, input_ids=ids), rtol=0, atol=1e-6
    )


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = focus_model_class(type(TINY["llama"].build()))(TINY["llama"].build_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert any(".focus." in key for key in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loaded_in_half(dtype: torch.dtype, tmp_path: Path) -> None:
    model = patched("llama")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert logits(loaded, input_ids=tokens()).dtype == dtype


def test_towers_are_chosen(tmp_path: Path) -> None:
    inputs, sites = picture_and_text(), {}
    for pattern in (None, "vision", "language_model.*layers.1"):
        model = focused(llava(), modules=pattern)
        sites[pattern] = {path for path, _ in model.named_modules() if path.endswith(".focus")}
        folder = tmp_path / str(len(sites))
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        assert loaded.config.text_config.model_type in ("llama", "focus_llama")
        assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
        # The text model alone carries what it needs
        inner = model.model.language_model
        if pattern != "vision":
            inner.save_pretrained(folder / "inner")
            alone = type(inner).from_pretrained(folder / "inner").state_dict()
            assert all(torch.equal(alone[key], value) for key, value in inner.state_dict().items())
            assert alone.keys() == inner.state_dict().keys()
    assert len(sites[None]) == 4
    assert sites["vision"] == {path for path in sites[None] if "vision" in path}
    assert len(sites["language_model.*layers.1"]) == 1


def test_parts_of_a_config_stay_what_the_modules_hold() -> None:
    model = llava()
    text, whole = model.config.text_config, model.config
    before = logits(model, **picture_and_text())
    apply_focus(model, SETTINGS)
    assert model.config.text_config is model.model.language_model.config
    assert "focus_config" not in model.config.to_dict()["text_config"]
    torch.testing.assert_close(logits(model, **picture_and_text()), before, rtol=0, atol=1e-5)
    remove_focus(model)
    assert model.config.text_config is model.model.language_model.config
    assert type(model.config.text_config) is type(text)
    assert model.config.to_dict() == whole.to_dict()
    assert torch.equal(logits(model, **picture_and_text()), before)


def test_attention_off_the_interface_is_put_back() -> None:
    model, ids = gptj(), tokens()
    kinds = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    before = logits(model, input_ids=ids)
    apply_focus(model, SETTINGS)
    assert type(model.transformer.h[0].attn) is not kinds["transformer.h.0.attn"][0]
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-5)
    copied = copy.deepcopy(randomize(model))
    assert torch.equal(logits(copied, input_ids=ids), logits(model, input_ids=ids))
    remove_focus(model)
    assert kinds == {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    assert torch.equal(logits(model, input_ids=ids), before)


def test_attention_off_the_interface_sees_no_further_than_asked() -> None:
    """Beyond `max_dist` of every layer, only the sinks reach a token."""
    model = focused(gptj(), max_span=3, ramp=1, max_dist=4, sink_tokens=2)
    ids = tokens(1, 20)
    before = logits(model, input_ids=ids)
    for position, reaches in ((8, False), (1, True), (17, True)):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] - 2) % 90 + 3
        assert torch.equal(before[0, -1], logits(model, input_ids=changed)[0, -1]) != reaches


def test_a_whisper_s_prompt_is_left_as_it_is() -> None:
    """transformers puts a start token before that of any other encoder-decoder."""
    plain = TINY["whisper"].build()
    model = apply_focus(copy.deepcopy(plain), SETTINGS)
    features = make_inputs("whisper")["input_features"]
    prompt = torch.tensor([[5, 6, 7]]).expand(len(features), -1)
    options = {"decoder_input_ids": prompt, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(one.generate(features, **options) for one in (plain, model)))
