"""Model cards: metadata survives a round trip, bad values are refused, the usage snippet runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from small_runs import FOCUS, byte_tokenizer, tiny_bert, tiny_bert_classifier, tiny_llama
from transformers import PreTrainedModel

from hf_focus import apply_focus
from hf_focus.cards import CardFacts, is_hub_id, model_card
from hf_focus.errors import FocusConfigError

FACTS = {
    "name": "some-model-focus",
    "pipeline_tag": "text-generation",
    "base_model": "someone/some-model",
    "license": "apache-2.0",
    "language": ["en", "pt-BR"],
    "dataset": "someone/some-data",
    "dataset_config": "raw",
    "eval_split": "validation",
    "metrics": {"loss": 1.5, "perplexity": np.float32(4.5), "accuracy": np.int64(1)},
    "focus": FOCUS.to_dict(),
    "training": {"steps": 10},
}


def test_metadata_survives_a_round_trip(tmp_path: Path) -> None:
    model_card(CardFacts(**FACTS)).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "!!python" not in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "transformers"
    assert data.base_model == "someone/some-model"
    assert data.base_model_relation == "finetune"
    assert data.license == "apache-2.0"
    assert data.language == ["en", "pt-BR"]
    assert data.datasets == ["someone/some-data"]
    assert {"focusa", "hf_focus"} <= set(data.tags)
    assert data.metrics == ["perplexity", "accuracy"]
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == FACTS["metrics"]
    assert {type(result.metric_value) for result in results.values()} == {float}
    assert results["loss"].dataset_type == "someone/some-data"
    assert results["loss"].dataset_split == "validation"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    facts = CardFacts("m", "fill-mask", base_model=str(tmp_path), dataset=str(tmp_path / "x"))
    text = str(model_card(facts))
    header = text.split("---")[1]
    assert str(tmp_path) not in text
    for key in ("base_model", "datasets", "license", "language", "tags", "metrics", "model-index"):
        assert key not in header
    assert "FocusA**" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"license": "Apache 2"}, "license"),
        ({"language": ["English"]}, "language"),
        ({"pipeline_tag": "cooking"}, "pipeline_tag"),
        ({"metrics": {"loss": float("nan")}}, "loss"),
        ({"metrics": {"loss": np.float64("inf")}}, "loss"),
        ({"metrics": {"loss": "1.0"}}, "loss"),
    ],
)
def test_what_the_hub_cannot_read_is_refused(change: dict, argument: str) -> None:
    with pytest.raises(FocusConfigError, match=argument):
        model_card(CardFacts(**{**FACTS, **change}))


def test_ids_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("someone/some-model")
    (tmp_path / "someone" / "some-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("someone/some-model", "./a", "/a/b", "a/b/c", "", None):
        assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("tag", "model", "focus"),
    [
        ("text-generation", tiny_llama, True),
        ("text-generation", tiny_llama, False),
        ("fill-mask", tiny_bert, True),
        ("text-classification", tiny_bert_classifier, True),
    ],
)
def test_the_snippet_runs_in_the_folder_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tag: str, model: type, focus: bool
) -> None:
    built: PreTrainedModel = apply_focus(model(), FOCUS) if focus else model()
    built.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    card = model_card(CardFacts("m", tag, focus=FOCUS.to_dict() if focus else None))
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert ("import hf_focus" in snippet) == focus
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert type(names["model"]).__name__.startswith("Focus") == focus
    assert capsys.readouterr().out.strip()
