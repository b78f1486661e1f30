"""Fine-tuning: which weights are trained, and what is left of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    FOCUS,
    SIZES,
    byte_tokenizer,
    folder,
    losses,
    run,
    tiny_bert,
    tiny_llama,
)
from tiny import CAUSAL_LMS, TINY
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
)

from hf_focus import FocusConfig, apply_focus
from hf_focus.arguments import TrainArguments
from hf_focus.errors import FocusConfigError
from hf_focus.preparation import check_causal, parameter_groups


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_language_models_see_no_later_token(name: str) -> None:
    check_causal(TINY[name].build())


@pytest.mark.parametrize("patched", [True, False])
def test_an_encoder_is_no_language_model(patched: bool, tmp_path: Path, data: dict[str, Any]) -> None:
    """It would be shown what it is to predict, and be right every time."""
    torch.manual_seed(0)
    model = BertLMHeadModel(tiny_bert().config)
    with pytest.raises(FocusConfigError, match="`task` got 'causal-lm'; accepted: masked-lm"):
        run(tmp_path, data, apply_focus(model, FOCUS) if patched else model)
    check_causal(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)))


def test_freezing_the_base_trains_focus_alone(tmp_path: Path, data: dict[str, Any]) -> None:
    start = apply_focus(tiny_llama(), FOCUS).state_dict()
    trained = run(tmp_path, data, tiny_llama(), model_args={"freeze_base": True}, max_steps=6).model.state_dict()
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    assert {name for name in moved if ".focus." not in name} == set()
    parameters = {name for name, _ in apply_focus(tiny_llama(), FOCUS).named_parameters() if ".focus." in name}
    assert parameters <= moved


def test_freezing_the_base_still_trains_a_new_head(tmp_path: Path, data: dict[str, Any]) -> None:
    tiny_llama().save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    arguments = {"model_name_or_path": str(tmp_path / "start"), "freeze_base": True}
    model = run(tmp_path, data, task="sequence-classification", model_args=arguments).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained
    assert all(".focus." in name for name in trained - {"score.weight"})


def test_lora_trains_a_new_head_in_full(tmp_path: Path, data: dict[str, Any]) -> None:
    tiny_bert().save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    heads = []
    for name, steps in (("a", 1), ("b", 6)):
        arguments = {"model_name_or_path": str(tmp_path / "start"), "lora_rank": 2}
        task = "sequence-classification"
        result = run(folder(tmp_path, name), data, task=task, model_args=arguments, max_steps=steps, warmup_share=0.5)
        heads.append(result.model.classifier.weight)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "out").state_dict()
        state = result.model.state_dict()
        assert set(loaded) == set(state)
        assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    assert not torch.equal(*heads)


@pytest.mark.parametrize("focus", [FOCUS, None], ids=["focus", "plain"])
def test_lora_is_merged_and_reloads(tmp_path: Path, data: dict[str, Any], focus: FocusConfig | None) -> None:
    result = run(tmp_path, data, tiny_llama(), focus, model_args={"lora_rank": 2}, max_steps=6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = (apply_focus(tiny_llama(), focus) if focus else tiny_llama()).state_dict()
    state = loaded.state_dict()
    assert set(state) == set(start)
    moved = {name for name, value in state.items() if not torch.equal(value, start[name])}
    linear = {name for name in start if re.search(r"(_proj)\.weight$", name)}
    assert {name for name in moved if ".focus." not in name} == linear
    assert any(name.endswith(".focus.join") for name in moved) == (focus is not None)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(loaded.eval()(ids).logits, result.model(ids).logits)


def test_lora_resumes_to_the_same_losses(tmp_path: Path, data: dict[str, Any]) -> None:
    settings = {"model_args": {"lora_rank": 2, "lora_dropout": 0.1}, "max_steps": 4}
    whole = run(folder(tmp_path, "a"), data, tiny_llama(), save_steps=2, **settings)
    checkpoint = str(tmp_path / "a" / "out" / "checkpoint-2")
    resumed = run(folder(tmp_path, "b"), data, tiny_llama(), resume=checkpoint, **settings)
    assert losses(resumed) == {k: v for k, v in losses(whole).items() if k > 2}


def test_a_focus_model_is_trained_on_as_it_is(tmp_path: Path, data: dict[str, Any]) -> None:
    run(tmp_path, data, tiny_llama())
    again = {"model_name_or_path": str(tmp_path / "out")}
    second = run(folder(tmp_path, "b"), data, focus=FocusConfig(), model_args=again)
    assert second.model.focus_config == FOCUS
    with pytest.raises(FocusConfigError, match="max_span"):
        run(folder(tmp_path, "c"), data, focus=FocusConfig(max_span=9), model_args=again)
    with pytest.raises(FocusConfigError, match="focus"):
        run(folder(tmp_path, "d"), data, focus=None, model_args=again)


def test_from_scratch_reads_the_config_alone(tmp_path: Path, data: dict[str, Any]) -> None:
    with torch.no_grad():
        model = tiny_llama()
        model.lm_head.weight.fill_(0.5)
    model.save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    arguments = {"model_name_or_path": str(tmp_path / "start"), "from_scratch": True}
    result = run(tmp_path, data, model_args=arguments, max_steps=1)
    assert result.model.lm_head.weight.abs().max() < 0.4
    assert result.model.config.hidden_size == 32


def test_groups_of_parameters() -> None:
    model = apply_focus(tiny_llama(), FOCUS)
    groups = parameter_groups(model, TrainArguments(output_dir="x", learning_rate=1e-3, focus_learning_rate=1e-2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (1e-2 if ".focus." in name else 1e-3)
            plain = parameter.ndim < 2 or re.search(r"norm|bias|gain|predictor|readout|focus\.span", name)
            assert group["weight_decay"] == (0.0 if plain else 0.01)
    assert len(groups) == 4
