"""Model cards: metadata survives a round trip, bad values are refused, the usage snippet runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from small_runs import FOCUS, byte_tokenizer, tiny_bert, tiny_bert_classifier, tiny_llama
from transformers import PreTrainedModel

from hf_focus import apply_focus
from hf_focus.card_checks import is_hub_id, read_card
from hf_focus.cards import CardFacts, address_card, find_pipeline_tag, model_card
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
        ({"learned": {"span (tokens)": float("nan")}}, "span"),
        ({"tags": [" "]}, "tags"),
        ({"kind": "poem"}, "kind"),
        ({"kind": "adapter", "base_model": None}, "base_model"),
        ({"kind": "adapter", "base_model": "/somewhere/model"}, "base_model"),
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


METADATA = {
    "license": "mit",
    "base_model": "someone/some-model",
    "pipeline_tag": "text-generation",
    "model-index": [
        {
            "name": "m",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "d", "name": "d"},
                    "metrics": [{"type": "loss", "value": 1.5}],
                }
            ],
        }
    ],
}
RESULT = METADATA["model-index"][0]["results"][0]


def with_result(**changes: Any) -> dict[str, Any]:
    return {"model-index": [{"name": "m", "results": [{**RESULT, **changes}]}]}


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"base_model": "/home/me/model"}, "base_model"),
        ({"base_model": ["someone/some-model", "../model"]}, "base_model"),
        ({"base_model": {"name": "x"}}, "base_model"),
        ({"base_model_relation": "cousin"}, "base_model_relation"),
        ({"license": "Apache 2"}, "license"),
        ({"pipeline_tag": "text2text-generation"}, "pipeline_tag"),
        ({"library_name": "keras"}, "library_name"),
        ({"language": False}, "language"),
        ({"datasets": ["data/train.jsonl/x"]}, "datasets"),
        ({"tags": [3]}, "tags"),
        ({"metrics": [{"accuracy": 1}]}, "metrics"),
        (with_result(metrics=[{"type": "loss", "value": float("nan")}]), "finite"),
        (with_result(metrics=[{"type": "loss", "value": "low"}]), "finite"),
        (with_result(metrics=[{"value": 1.0}]), "model-index"),
        (with_result(dataset={"type": "d", "name": ""}), "model-index"),
        (with_result(task={"type": "cooking"}), "task"),
        ({"model-index": [{"name": "m"}]}, "model-index"),
    ],
)
def test_metadata_of_a_written_card_is_checked(tmp_path: Path, change: dict[str, Any], argument: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"---\n{yaml.safe_dump(METADATA)}---\n\n# A model\n")
    assert read_card(path).data.license == "mit"
    path.write_text(f"---\n{yaml.safe_dump({**METADATA, **change})}---\n\n# A model\n")
    with pytest.raises(FocusConfigError, match=argument):
        read_card(path)


@pytest.mark.parametrize(
    "text", ["# No metadata\n", "---\n- a list\n---\n", "---\na: [\n---\n", "---\na: \xff\n---\n"]
)
def test_a_card_without_readable_metadata_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    with pytest.raises(FocusConfigError, match="README"):
        read_card(tmp_path / "README.md")


def test_learned_spans_and_the_picture_are_in_the_card() -> None:
    spans = {"layers.0": [1.25, 2.0], "layers.1": [3.0, 4.0]}
    learned = {"span (tokens)": np.float32(2.5), "sparsity": 0.75}
    text = str(model_card(CardFacts(**FACTS, learned=learned, spans=spans, picture="focus.png")))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| span (tokens) | 2.5 |" in rows
    assert "| sparsity | 0.75 |" in rows
    assert "| `layers.0` | 1.2, 2.0 |" in rows
    assert f"out of {FOCUS.max_span}" in text
    assert text.count("](focus.png)") == 1
    # Tables and headings stand apart, or Markdown takes them for text
    assert not re.search(r"[^\n]\n(## |### |\| \| \||\| layer)", text)
    plain = str(model_card(CardFacts(**FACTS)))
    assert "Learned" not in plain
    assert "![" not in plain


def test_the_card_of_an_adapter() -> None:
    card = model_card(CardFacts(**{**FACTS, "kind": "adapter"}))
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert 'from_pretrained("someone/some-model"), name)' in snippet
    assert "AutoModelForCausalLM" in snippet
    assert {"focusa", "hf_focus"} <= set(card.data.tags)


def test_a_card_is_addressed_to_its_repository() -> None:
    text = str(model_card(CardFacts(**FACTS)))
    addressed = address_card(text, "me/there")
    assert 'name = "me/there"' in addressed
    assert addressed.replace("me/there", ".") == text
    # What already says where it is stays
    assert address_card(addressed, "me/elsewhere") == addressed


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        # The Hub has no such task any more
        ("T5ForConditionalGeneration", None),
        ("LlamaModel", None),
        (None, None),
    ],
)
def test_tasks_of_architectures(architecture: str | None, tag: str | None) -> None:
    assert find_pipeline_tag(architecture) == tag


@pytest.mark.parametrize(
    ("tag", "model", "focus"),
    [
        ("text-generation", tiny_llama, True),
        ("text-generation", tiny_llama, False),
        ("fill-mask", tiny_bert, True),
        ("text-classification", tiny_bert_classifier, True),
        (None, tiny_bert, True),
    ],
)
def test_the_snippet_runs_in_the_folder_of_the_card(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tag: str | None,
    model: type,
    focus: bool,
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
