"""Caches of models that show a part of the text its own future: an image to itself, or a whole prefix."""

from typing import Any

import pytest
import torch
from tiny import randomize
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)

from hf_focus import FocusConfig, apply_focus

SETTINGS = FocusConfig(max_span=7, ramp=3, max_iterations=3, initial_span=0.5)
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
IMAGE = 90


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gemma3() -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    text = {**TEXT, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(
        text_config={**text, "num_key_value_heads": 2},
        vision_config={**VISION, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )
    ids = torch.arange(3, 23)[None]
    ids[:, 5:9] = IMAGE
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": pixels()}
    return Gemma3ForConditionalGeneration(config).eval(), inputs


def paligemma() -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "num_key_value_heads": 1},
        vision_config={**VISION, "model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    ids = torch.arange(3, 17)[None]
    ids[:, :4] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": pixels(), "attention_mask": torch.ones_like(ids)}
    return PaliGemmaForConditionalGeneration(config).eval(), inputs


def test_an_image_that_sees_itself_does_not_shift_a_static_cache() -> None:
    model, inputs = gemma3()
    randomize(apply_focus(model, SETTINGS, modules="language_model"))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
    with torch.no_grad():
        whole, cached = model(**inputs).logits, model(**inputs, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [gemma3, paligemma])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_patch_changes_no_token(build: Any, implementation: str | None) -> None:
    model, inputs = build()
    before = model.generate(**inputs, **GREEDY, cache_implementation=implementation)
    apply_focus(model, SETTINGS)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=implementation), before)


def test_a_prefix_is_decoded_as_it_is_read() -> None:
    model, inputs = paligemma()
    randomize(apply_focus(model, SETTINGS, modules="language_model"))
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    # The first token; later ones stand in a prefix, which sees all of itself, where nothing is cached
    torch.testing.assert_close(cached.scores[0], plain.scores[0], rtol=1e-4, atol=1e-5)
    assert cached.sequences.shape[1] == 14 + 8


def test_a_prefix_of_attention_off_the_interface() -> None:
    torch.manual_seed(0)
    config = CpmAntConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, prompt_length=4)
    config.num_hidden_layers = 2
    model = CpmAntForCausalLM(config).eval()
    ids = torch.arange(7, 19)[None]
    before = model.generate(input_ids=ids, **GREEDY)
    apply_focus(model, SETTINGS)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), before)
