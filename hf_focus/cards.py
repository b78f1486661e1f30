"""Model cards: checked metadata and the template that comes with hf_focus."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import FocusConfigError, bad_value

TEMPLATE = "model_card.md"
TAGS = ("focusa", "hf_focus")
# The identifiers that the Hub accepts (hub-docs, "Licenses")
_LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
    gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl
    apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 grok2-community gemma unknown other"""
LICENSES = frozenset(_LICENSES.split())
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")

_SNIPPETS = {
    "text-generation": """from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))""",
    "fill-mask": """from transformers import AutoModelForMaskedLM, AutoTokenizer
{imports}
name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForMaskedLM.from_pretrained(name)
inputs = tokenizer(f"The {{tokenizer.mask_token}} is here.", return_tensors="pt")
masked = inputs["input_ids"][0] == tokenizer.mask_token_id
print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))""",
    "text-classification": """from transformers import AutoModelForSequenceClassification, AutoTokenizer
{imports}
name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
logits = model(**tokenizer("Some text.", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])""",
}


@dataclass
class CardFacts:
    """What a card says. Everything but the name and the task may be left out.

    Args:
        name: title, and the model's name in the results.
        pipeline_tag: the task, as the Hub names it.
        repo_id: where the usage snippet loads from; the default is the folder that the card lies in.
        base_model: id on the Hub of the model that was fine-tuned; anything that is no id is left out of the card.
        license, language: as the Hub writes them.
        dataset: id on the Hub of the training data; anything that is no id is left out.
        dataset_config, eval_split: of the evaluation data.
        metrics: name -> result, on the evaluation data.
        focus: settings of FocusA; None: the model carries none.
        training: rows of the training table.
        tags: beside `TAGS`.
    """

    name: str
    pipeline_tag: str
    repo_id: str = "."
    base_model: str | None = None
    license: str | None = None
    language: Sequence[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    eval_split: str | None = None
    metrics: dict[str, Real] = field(default_factory=dict)
    focus: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be an id on the Hub: well-formed, and nothing of that name on this machine."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_card_names(license: str | None, language: Sequence[str] | None) -> None:
    """Refuse what the Hub would refuse.

    Raises:
        FocusConfigError: no licence id of the Hub, or no language code.
    """
    if license is not None and license not in LICENSES:
        raise FocusConfigError(
            bad_value("license", license, f"a licence id of the Hub: {', '.join(sorted(LICENSES))}")
        )
    for code in language or ():
        if not _LANGUAGE.fullmatch(code):
            raise FocusConfigError(bad_value("language", code, "codes such as 'en' or 'pt-BR', or 'multilingual'"))


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with metadata that the Hub accepts.

    Returns:
        a card; `card.save(path)` writes it, `card.data` is its metadata.

    Raises:
        FocusConfigError: a task without a snippet, a licence or language that is not known, a metric that is no finite
            number.
    """
    check_card_names(facts.license, facts.language)
    if facts.pipeline_tag not in _SNIPPETS:
        raise FocusConfigError(bad_value("pipeline_tag", facts.pipeline_tag, "one of " + ", ".join(_SNIPPETS)))
    base_model = facts.base_model if is_hub_id(facts.base_model) else None
    dataset = facts.dataset if is_hub_id(facts.dataset) else None
    metrics = {name: _number(name, value) for name, value in facts.metrics.items()}
    results = [
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
    tags = [*TAGS] if facts.focus is not None else []
    settings = {
        "license": facts.license,
        "language": list(facts.language) if facts.language else None,
        "library_name": "transformers",
        "pipeline_tag": facts.pipeline_tag,
        "base_model": base_model,
        "base_model_relation": "finetune" if base_model else None,
        "datasets": [dataset] if dataset else None,
        "tags": [*tags, *(tag for tag in facts.tags if tag not in tags)] or None,
        "metrics": [name for name in metrics if name != "loss"] or None,
        "model_name": facts.name,
        "eval_results": results or None,
    }
    data = ModelCardData(**{name: value for name, value in settings.items() if value is not None})
    template = files("hf_focus.model_cards").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        name=facts.name,
        base_model_id=base_model,
        dataset_id=dataset,
        results=metrics,
        focus=facts.focus,
        training=facts.training,
        snippet=_SNIPPETS[facts.pipeline_tag].format(
            repo_id=facts.repo_id,
            imports="\nimport hf_focus  # registers the classes\n" if facts.focus is not None else "",
        ),
    )


def _number(name: str, value: Any) -> float:
    # NumPy's numbers would be written as Python objects, and NaN as a value that the Hub cannot read
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise FocusConfigError(bad_value(f"metrics[{name!r}]", value, "a finite number"))
    return float(value)
