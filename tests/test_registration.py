"""Focus models through transformers' own doors: Auto classes, config files, pipelines, pickles."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launch import finish, fork
from safetensors.torch import load_file, save_file
from tiny import SETTINGS, TINY, logits, make_inputs, patched, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_focus import FocusConfig, apply_focus, focus_config_class, focus_model_class, supported_architectures
from hf_focus.errors import FocusCheckpointError, FocusConfigError, FocusError

AUTO = {
    "llama": [
        "AutoModel",
        "ForCausalLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ],
    "gpt2": ["AutoModel", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"],
    "bert": [
        "AutoModel",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ],
    "roberta": ["AutoModel", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForMultipleChoice"],
    "distilbert": ["AutoModel", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"],
    "modernbert": ["AutoModel", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"],
    "vit": ["AutoModel", "ForImageClassification", "ForMaskedImageModeling"],
    "wav2vec2": ["AutoModel", "ForAudioClassification", "ForCTC", "ForPreTraining"],
    "whisper": ["AutoModel", "ForSpeechSeq2Seq", "ForAudioClassification"],
    "t5": ["AutoModel", "ForSeq2SeqLM", "ForSequenceClassification", "ForQuestionAnswering"],
    "bart": ["AutoModel", "ForSeq2SeqLM", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"],
}


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name, tasks in AUTO.items() for task in tasks], ids=lambda value: value
)
def test_auto_classes_make_save_and_load(name: str, task: str, tmp_path: Path) -> None:
    auto = getattr(transformers, task if task == "AutoModel" else f"AutoModel{task}")
    config_class = focus_config_class(type(TINY[name].build_config()))
    changes = {"is_decoder": True} if name == "roberta" and task == "ForCausalLM" else {}
    config = config_class(**{**TINY[name].sizes, **changes}, focus_config=SETTINGS)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    assert type(model).__name__.startswith("Focus")
    assert any(".focus." in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_config_file_round_trip(tmp_path: Path) -> None:
    config = focus_config_class(LlamaConfig)(**TINY["llama"].sizes, focus_config=FocusConfig(max_span=9, layers=[1]))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is focus_config_class(LlamaConfig)
    assert FocusConfig.from_dict(loaded.focus_config) == FocusConfig(max_span=9, layers=[1])
    saved_only = {"_name_or_path": str(tmp_path), "architectures": loaded.architectures}
    assert loaded.to_dict() == {**config.to_dict(), **saved_only}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "focus_llama"


def test_plain_checkpoint_through_the_auto_class(tmp_path: Path) -> None:
    plain = TINY["llama"].build()
    plain.save_pretrained(tmp_path)
    config = focus_config_class(LlamaConfig).from_pretrained(tmp_path, focus_config=SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert type(model) is focus_model_class(LlamaForCausalLM)
    assert model.focus_config == SETTINGS
    assert torch.equal(logits(model, **make_inputs("llama")), logits(plain, **make_inputs("llama")))


def test_an_older_format_is_what_it_was(tmp_path: Path) -> None:
    """Before format 2 nothing that was fed back was rotated."""
    model = patched("llama", FocusConfig.build(SETTINGS, rotate_feedback=False))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["focus_config"]["rotate_feedback"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "focus_format": 1}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))
    assert not torch.equal(logits(patched("llama"), input_ids=tokens()), logits(model, input_ids=tokens()))


def test_loads_in_a_new_process(tmp_path: Path) -> None:
    model = patched("llama")
    model.save_pretrained(tmp_path)
    torch.save(logits(model, input_ids=tokens()), tmp_path / "logits.pt")
    assert finish([fork(load_and_compare, str(tmp_path))]) == [0]


def load_and_compare(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model, input_ids=tokens()), torch.load(f"{folder}/logits.pt"))
    assert type(model).__name__ == "FocusLlamaForCausalLM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_in_a_dtype_keeps_the_table(dtype: torch.dtype, tmp_path: Path) -> None:
    model = patched("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for key, buffer in loaded.named_buffers():
        if ".refiner." in key:
            assert torch.equal(buffer, model.get_buffer(key)), key


def test_models_and_configs_pickle() -> None:
    model = patched("llama")
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert torch.equal(logits(copy, input_ids=tokens()), logits(model, input_ids=tokens()))


def edit(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


CORRUPT: dict[str, tuple[Any, str]] = {
    "no settings": (lambda c: c.pop("focus_config"), "`focus_config` got None"),
    "settings of another kind": (lambda c: c.update(focus_config=[1]), r"`focus_config` got \[1\]"),
    "unknown setting": (lambda c: c["focus_config"].update(spam=1), "got 'spam'"),
    "value out of range": (lambda c: c["focus_config"].update(max_span=-1), "`max_span` got -1"),
    "other layers": (lambda c: c["focus_config"].update(layers=[0]), "unexpected: model.layers.1.self_attn.focus"),
    "other iterations": (lambda c: c["focus_config"].update(max_iterations=1), "unexpected: .*feedback_matrix"),
    "other join": (lambda c: c["focus_config"].update(combine="projection"), "of another shape: .*join"),
    "bad architecture": (lambda c: c.update(focus_architecture={"heads": 1}), "`focus_architecture` got"),
    "other attention": (lambda c: c["focus_architecture"].update(attention=["Nothing"]), "Nothing"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_checkpoint_that_cannot_be_rebuilt(case: str, tmp_path: Path) -> None:
    patched("llama").save_pretrained(tmp_path)
    change, message = CORRUPT[case]
    edit(tmp_path, change)
    with pytest.raises(FocusError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_of_ours_that_are_missing(tmp_path: Path) -> None:
    patched("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.self_attn.focus.join"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FocusCheckpointError, match=r"missing: model\.layers\.0\.self_attn\.focus\.join \(1\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_part_of_a_model_loads_its_part(tmp_path: Path) -> None:
    patched("bart").save_pretrained(tmp_path / "bart")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "bart")
    paths = [path for path, _ in decoder.named_modules() if path.endswith(".focus")]
    assert len(paths) == 2
    whole = patched("llama")
    whole.save_pretrained(tmp_path / "llama")
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", num_hidden_layers=1)
    assert len(shorter.model.layers) == 1
    assert torch.equal(shorter.model.layers[0].self_attn.focus.join, whole.model.layers[0].self_attn.focus.join)


@pytest.mark.parametrize("factory", [focus_model_class, focus_config_class])
@pytest.mark.parametrize("base", [int, "LlamaForCausalLM", None])
def test_factories_take_classes_only(factory: Any, base: Any) -> None:
    with pytest.raises(FocusConfigError, match="`base` got"):
        factory(base)


def test_factories_are_stable() -> None:
    model_class = focus_model_class(LlamaForCausalLM)
    assert focus_model_class(LlamaForCausalLM) is model_class
    assert focus_model_class(model_class) is model_class
    assert model_class.config_class is focus_config_class(LlamaConfig)
    assert type(apply_focus(TINY["llama"].build(), SETTINGS)) is model_class


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are w1, w2, … with these numbers as ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, **{f"w{i}": i for i in range(1, 99)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def test_pipeline(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    patched("llama").save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model).__name__ == "FocusLlamaForCausalLM"
    result = generator("w3 w4 w5", max_new_tokens=5, min_new_tokens=5, do_sample=False, return_tensors=True)
    assert len(result[0]["generated_token_ids"]) == 8


def test_a_dict_of_settings_changes_those_that_were_saved(tmp_path: Path) -> None:
    apply_focus(TINY["llama"].build(), max_span=7, max_iterations=3).save_pretrained(tmp_path)

    def load(settings: FocusConfig | dict[str, Any]) -> FocusConfig:
        return AutoModelForCausalLM.from_pretrained(tmp_path, focus_config=settings).focus_config

    assert load({"backend": "reference"}) == FocusConfig(max_span=7, max_iterations=3, backend="reference")
    # A whole config says everything
    assert load(FocusConfig(max_iterations=3)).max_span == FocusConfig().max_span
    with pytest.raises(FocusConfigError, match="bakend"):
        load({"bakend": "reference"})


def test_attention_weights_may_be_asked_for_in_the_config(tmp_path: Path) -> None:
    before, after = (TINY["llama"].build(attn_implementation="eager") for _ in range(2))
    before.config.output_attentions = True
    apply_focus(before)
    apply_focus(after).config.output_attentions = True
    for model in (before, after):
        model.save_pretrained(tmp_path)
        assert len(model(tokens()).attentions) == model.config.num_hidden_layers
        assert json.loads((tmp_path / "config.json").read_text())["output_attentions"]
    with pytest.raises(ValueError, match="output_attentions"):
        apply_focus(TINY["llama"].build()).config.output_attentions = True


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_trainer_smooths_labels_as_of_the_plain_model(name: str, tmp_path: Path) -> None:
    """It shifts them for those language models whose class it knows by name."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(4).tolist()]
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True)
    plain = TINY[name].build()
    expected, found = (
        Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
        for model in (plain, apply_focus(copy.deepcopy(plain), SETTINGS))
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_supported_types_are_transformers_own() -> None:
    patched("llama")
    assert not any(name.startswith("focus_") for name in supported_architectures())
