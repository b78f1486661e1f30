"""Model cards: what they say, their metadata, usage that runs as pasted, and the templates that come with hf_focus."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from .card_checks import PIPELINE_TAGS, check_metadata, finite_number, is_hub_id
from .errors import FocusConfigError, bad_value

CARD_FILE = "README.md"
PICTURE_FILE = "focus.png"
TAGS = ("focusa", "hf_focus")
# Of the templates: what follows the usage, whatever the kind
_SECTIONS = "card_sections.md"
# What a card says to load, as long as it is not known where the model will be: the folder that the card lies in
HERE = "."


@dataclass(frozen=True)
class _Kind:
    """What distinguishes the card of a full model from that of an adapter."""

    template: str
    library: str
    relation: str
    imports: str
    load: str


_KINDS = {
    "model": _Kind(
        "model_card.md",
        "transformers",
        "finetune",
        "from transformers import {feature_class}{auto_class}{tokenizer_class}",
        "model = {auto_class}.from_pretrained(name)",
    ),
    "adapter": _Kind(
        "adapter_card.md",
        "peft",
        "adapter",
        "from peft import PeftModel\nfrom transformers import {feature_class}{auto_class}{tokenizer_class}",
        'model = PeftModel.from_pretrained({auto_class}.from_pretrained("{base_model}"), name).eval()',
    ),
}
_FOCUS_IMPORT = "import hf_focus  # registers {what}"

# Task -> the Auto class that loads its models, and what to do with one
_USES = {
    "text-generation": (
        "AutoModelForCausalLM",
        """inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))""",
    ),
    "fill-mask": (
        "AutoModelForMaskedLM",
        """inputs = tokenizer(f"The {tokenizer.mask_token} is here.", return_tensors="pt")
masked = inputs["input_ids"][0] == tokenizer.mask_token_id
print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))""",
    ),
    "text-classification": (
        "AutoModelForSequenceClassification",
        """logits = model(**tokenizer("Some text.", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])""",
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        """logits = model(**tokenizer("Some text.", return_tensors="pt")).logits
print([model.config.id2label[number] for number in logits[0].argmax(-1).tolist()])""",
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        """inputs = tokenizer("Who came?", "Some say that nobody came.", return_tensors="pt")
outputs = model(**inputs)
first, last = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))""",
    ),
    "automatic-speech-recognition": (
        "AutoModelForSpeechSeq2Seq",
        """features = AutoFeatureExtractor.from_pretrained(name)
second = features([0.0] * features.sampling_rate, sampling_rate=features.sampling_rate, return_tensors="pt")
print(tokenizer.decode(model.generate(second["input_features"])[0]))""",
    ),
}
_OTHER_USE = 'print(f"{type(model).__name__}, {model.num_parameters():,} parameters")'


@dataclass
class CardFacts:
    """What a card says. Everything but the name and the task may be left out.

    Args:
        name: title, and the model's name in the results.
        pipeline_tag: the task, as the Hub names it; None: not known.
        repo_id: where the usage snippet loads from; the default is the folder that the card lies in.
        kind: "model", or "adapter" for PEFT, which needs `base_model`.
        base_model: id on the Hub of the model that was fine-tuned; for a model, what is no id is left out.
        license, language: as the Hub writes them.
        dataset: id on the Hub of the training data; anything that is no id is left out.
        dataset_config, eval_split: of the evaluation data.
        metrics: name -> result, on the evaluation data.
        focus: settings of FocusA; None: the model carries none.
        learned: what was measured of FocusA on the evaluation data: name with unit -> value.
        spans: layer -> mean span of each head, in tokens.
        picture: file name of a picture beside the card.
        training: rows of the training table.
        tags: beside `TAGS`.
        auto_class: Auto class that loads the model. Default: the task's.
        has_code: whether the folder holds the code that reads the model (`trust_remote_code=True`).
    """

    name: str
    pipeline_tag: str | None
    repo_id: str = HERE
    kind: Literal["model", "adapter"] = "model"
    base_model: str | None = None
    license: str | None = None
    language: Sequence[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    eval_split: str | None = None
    metrics: Mapping[str, Real] = field(default_factory=dict)
    focus: Mapping[str, Any] | None = None
    learned: Mapping[str, Real] = field(default_factory=dict)
    spans: Mapping[str, Sequence[Real]] = field(default_factory=dict)
    picture: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    auto_class: str | None = None
    has_code: bool = False


def find_pipeline_tag(architecture: str | None) -> str | None:
    """The Hub's task of a model class of transformers, by the class's name; None where it has none."""
    for tag, classes in TASK_MAPPING.items():
        names = {name for value in classes.values() for name in ([value] if isinstance(value, str) else value)}
        if architecture in names and tag in PIPELINE_TAGS:
            return tag
    return None


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with metadata that the Hub accepts.

    Returns:
        a card; `card.save(path)` writes it, `card.data` is its metadata.

    Raises:
        FocusConfigError: a kind, task, licence or language that is not known, a number that is not finite, an adapter
            without a base model on the Hub.
    """
    if facts.kind not in _KINDS:
        raise FocusConfigError(bad_value("kind", facts.kind, f"one of {', '.join(_KINDS)}"))
    kind = _KINDS[facts.kind]
    if facts.kind == "adapter" and not is_hub_id(facts.base_model):
        accepted = "the id of a model on the Hub: an adapter is of no use without the model that it was trained on"
        raise FocusConfigError(bad_value("base_model", facts.base_model, accepted))
    base_model = facts.base_model if is_hub_id(facts.base_model) else None
    dataset = facts.dataset if is_hub_id(facts.dataset) else None
    metrics = {name: finite_number(f"metrics[{name!r}]", value) for name, value in facts.metrics.items()}
    learned = {name: finite_number(f"learned[{name!r}]", value) for name, value in facts.learned.items()}
    tags = [*TAGS] if facts.focus is not None else []
    settings = {
        "license": facts.license,
        "language": list(facts.language) if facts.language else None,
        "library_name": kind.library,
        "pipeline_tag": facts.pipeline_tag,
        "base_model": base_model,
        "base_model_relation": kind.relation if base_model else None,
        "datasets": [dataset] if dataset else None,
        "tags": [*tags, *(tag for tag in facts.tags if tag not in tags)] or None,
        "metrics": [name for name in metrics if name != "loss"] or None,
    }
    check_metadata(settings)
    # The Hub files results under a task
    results = _results(facts, dataset, metrics) if facts.pipeline_tag else []
    data = ModelCardData(
        **{name: value for name, value in settings.items() if value is not None},
        **({"model_name": facts.name, "eval_results": results} if results else {}),
    )
    template = "".join(
        files("hf_focus.model_cards").joinpath(name).read_text(encoding="utf-8") for name in (kind.template, _SECTIONS)
    )
    return ModelCard.from_template(
        data,
        template_str=template,
        name=facts.name,
        base_model_id=base_model,
        dataset_id=dataset,
        results=metrics,
        focus=facts.focus,
        learned=learned,
        spans=facts.spans,
        picture=facts.picture,
        training=facts.training,
        has_code=facts.has_code,
        snippet=_snippet(facts, kind),
    )


def _results(facts: CardFacts, dataset: str | None, metrics: Mapping[str, float]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=dataset or "local",
            dataset_name=dataset or "local files",
            dataset_config=facts.dataset_config if dataset else None,
            dataset_split=facts.eval_split,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def _snippet(facts: CardFacts, kind: _Kind) -> str:
    auto_class, use = _USES.get(facts.pipeline_tag, ("AutoModel", _OTHER_USE))
    has_text = use is not _OTHER_USE
    values = {
        "auto_class": facts.auto_class or auto_class,
        "tokenizer_class": ", AutoTokenizer" if has_text else "",
        "feature_class": "AutoFeatureExtractor, " if "AutoFeatureExtractor" in use else "",
        "base_model": facts.base_model,
        "what": "the adapter with PEFT" if facts.kind == "adapter" else "the classes",
    }
    lines = [kind.imports.format(**values)]
    if facts.focus is not None:
        lines += ["", _FOCUS_IMPORT.format(**values)]
    lines += ["", _name_line(facts.repo_id)]
    if has_text:
        source = f'"{facts.base_model}"' if facts.kind == "adapter" else "name"
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({source})")
    return "\n".join([*lines, kind.load.format(**values), use])


def _name_line(repo_id: str) -> str:
    return f'name = "{repo_id}"'


def address_card(text: str, repo_id: str) -> str:
    """The card's text with its usage loading from `repo_id`, where it said to load from its own folder."""
    return text.replace(f"\n{_name_line(HERE)}\n", f"\n{_name_line(repo_id)}\n")
