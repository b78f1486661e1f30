"""Matching: the first of two stages that turn a model with full attention into one with a bounded cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import losses, run, texts, tiny_llama
from tiny import PAD, TINY, make_inputs, patched

from hf_focus import FocusConfig
from hf_focus.errors import FocusConfigError
from hf_focus.matching import collect_distances, match_loss

BOUNDED = FocusConfig(max_span=7, ramp=3, max_iterations=2, max_dist=5, sink_tokens=1, refiner=True)
# Two that make masks, one by a table of positions, one whose heads have a norm, one of two parts
MODELS = ["llama", "gpt2", "mistral", "qwen3", "bart"]


@pytest.mark.parametrize("name", MODELS)
def test_while_matching_the_model_is_the_original(name: str) -> None:
    model, inputs = patched(name, BOUNDED), make_inputs(name)
    original = TINY[name].build()
    with torch.no_grad(), collect_distances() as distances:
        matched = model(**inputs).logits
    torch.testing.assert_close(matched, original(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert len(distances) == sum(".focus.join" in name for name, _ in model.named_parameters())
    assert all(distance > 1e-4 for distance in distances)
    # Outside of it, nothing has changed
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, matched, atol=1e-3)


def test_padding_is_seen_by_neither() -> None:
    model, inputs = patched("llama", BOUNDED), make_inputs("llama")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :6] = 0
    inputs["input_ids"][0, :6] = PAD
    with torch.no_grad(), collect_distances():
        matched = model(**inputs, attention_mask=mask).logits[mask.bool()]
        original = TINY["llama"].build()(**inputs, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(matched, original, atol=1e-5, rtol=1e-5)


def test_without_a_limit_and_untrained_there_is_no_distance() -> None:
    from hf_focus import apply_focus

    model = apply_focus(TINY["llama"].build(), BOUNDED, max_dist=None)
    assert match_loss(model, make_inputs("llama")) == 0


def test_only_focus_gets_a_gradient_of_it() -> None:
    model = patched("llama", BOUNDED)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".focus." in name)
    match_loss(model, make_inputs("llama")).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (".focus." in name), name


def test_two_stages_through_the_public_api(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(texts(40)))
    data = {"train_files": [str(path)]}
    settings: dict[str, Any] = {"data_args": {"block_size": 48, "eval_share": 0.1}, "batch_size": 4}
    start = tiny_llama()
    weights = {name: value.clone() for name, value in start.state_dict().items()}
    (tmp_path / "one").mkdir()
    frozen = {"model_args": {"freeze_base": True}}
    first = run(tmp_path / "one", data, start, BOUNDED, objective="match", max_steps=25, **frozen, **settings)
    distances = losses(first)
    assert distances[25] < 0.9 * distances[1]
    state = first.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    (tmp_path / "two").mkdir()
    byte_model = {"model_name_or_path": str(tmp_path / "one" / "out")}
    second = run(tmp_path / "two", data, None, FocusConfig(), model_args=byte_model, **settings)
    assert second.model.focus_config == BOUNDED
    assert second.metrics["loss"] < first.metrics["loss"]


BAD = {
    "no limit": ({"focus": FocusConfig()}, "max_dist"),
    "a penalty": ({"focus": FocusConfig(max_dist=5, span_penalty=0.1)}, "span_penalty"),
    "a base that rotates less": ({"focus": FocusConfig(max_dist=5, global_rotation=0.5)}, "global_rotation"),
    "base not frozen": ({"model_args": {}}, "freeze_base"),
    "checkpointing": ({"model_args": {"freeze_base": True, "gradient_checkpointing": True}}, "gradient_checkpointing"),
    "compiled": ({"torch_compile": True}, "torch_compile"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_matched_is_refused(tmp_path: Path, case: str) -> None:
    changes, word = BAD[case]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(texts(9)))
    options = {"focus": BOUNDED, "model_args": {"freeze_base": True}, **changes}
    with pytest.raises(FocusConfigError, match=word):
        run(tmp_path, {"train_files": [str(path)]}, tiny_llama(), objective="match", **options)
    assert not (tmp_path / "out").exists()
