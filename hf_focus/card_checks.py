"""Checks of a model card's metadata: what the Hub would refuse, or could not read, is refused here."""

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import FocusConfigError, bad_value

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
# The tasks that the Hub knows; no library that we install has the list
_PIPELINE_TAGS = """any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
    depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
    image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video image-to-3d
    image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice object-detection
    other question-answering reinforcement-learning robotics sentence-similarity summarization
    table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
    text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video time-series-forecasting token-classification translation
    unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
    visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection"""
PIPELINE_TAGS = frozenset(_PIPELINE_TAGS.split())
RELATIONS = frozenset({"finetune", "adapter", "merge", "quantized"})
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_METRIC = re.compile(r"[\w./ -]{1,100}")


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be an id on the Hub: well-formed, and nothing of that name on this machine."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def finite_number(argument: str, value: Any) -> float:
    """`value` as a plain float: NumPy's numbers would be written as Python objects, and NaN the Hub cannot read.

    Raises:
        FocusConfigError: no number, or NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise FocusConfigError(bad_value(argument, value, "a finite number"))
    return float(value)


# Entry of the metadata -> what is accepted, and whether one value of it is. A list is checked item by item
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "license": (f"a licence id of the Hub: {', '.join(sorted(LICENSES))}", lambda value: value in LICENSES),
    "language": (
        "codes such as 'en' or 'pt-BR', or 'multilingual'",
        # YAML reads `no`, Norwegian, as False
        lambda value: isinstance(value, str) and bool(_LANGUAGE.fullmatch(value)),
    ),
    "pipeline_tag": (f"a task of the Hub: {', '.join(sorted(PIPELINE_TAGS))}", lambda value: value in PIPELINE_TAGS),
    "base_model": ("the id of a model on the Hub, no folder of this machine", is_hub_id),
    "base_model_relation": (f"one of {', '.join(sorted(RELATIONS))}", lambda value: value in RELATIONS),
    "datasets": ("ids of data sets on the Hub, no files of this machine", is_hub_id),
    "tags": ("a list of non-empty strings", lambda value: isinstance(value, str) and bool(value.strip())),
    "metrics": (
        "a list of names of metrics",
        lambda value: isinstance(value, str) and bool(_METRIC.fullmatch(value)),
    ),
    "library_name": ("'transformers' or 'peft'", lambda value: value in ("transformers", "peft")),
}


def check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse what the Hub would refuse or could not read.

    Args:
        metadata: as in the header of a README.md; entries that are None or not there are not looked at.

    Raises:
        FocusConfigError: which names the entry, its value, and what is accepted.
    """
    for name, (accepted, holds) in _RULES.items():
        value = metadata.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value] if value is not None else []:
            if not _is_hashable(item) or not holds(item):
                raise FocusConfigError(bad_value(name, item, accepted))
    for entry in metadata.get("model-index") or ():
        _check_results(entry)


def _is_hashable(value: Any) -> bool:
    return not isinstance(value, (dict, list, set))


def _check_results(entry: Any) -> None:
    """One entry of the model-index: the name, and results that each hold task, dataset and metrics."""
    try:
        name, results = entry["name"], entry["results"]
        measured = [(metric["type"], metric["value"]) for result in results for metric in result["metrics"]]
        tasks = [result["task"]["type"] for result in results]
        complete = isinstance(name, str) and all(
            result["dataset"]["type"] and result["dataset"]["name"] for result in results
        )
    except (KeyError, TypeError) as error:
        accepted = f"entries of name and results, each with task, dataset and metrics ({error!r})"
        raise FocusConfigError(bad_value("model-index", entry, accepted)) from error
    if not complete:
        raise FocusConfigError(bad_value("model-index", entry, "a name, and data sets with type and name"))
    for tag in tasks:
        if tag not in PIPELINE_TAGS:
            raise FocusConfigError(bad_value("model-index: task", tag, "a task of the Hub"))
    for metric, value in measured:
        finite_number(f"model-index: {metric}", value)


def check_card_names(license: str | None, language: Sequence[str] | None) -> None:
    """Refuse a licence or a language that the Hub does not know.

    Raises:
        FocusConfigError: no licence id of the Hub, or no language code.
    """
    check_metadata({"license": license, "language": list(language) if language else None})


def read_card(path: Path) -> ModelCard:
    """The model card in a file, its metadata checked.

    Raises:
        FocusConfigError: it cannot be read, has no metadata, or metadata that the Hub would refuse.
    """
    readable = "a model card: YAML between two lines of ---, then Markdown"
    try:
        metadata = metadata_load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FocusConfigError(bad_value(path.name, str(path), f"{readable} ({_first_line(error)})")) from error
    if not metadata:
        raise FocusConfigError(bad_value(path.name, "no metadata", readable))
    check_metadata(metadata)
    try:
        return ModelCard.load(path)
    except ValueError as error:
        raise FocusConfigError(bad_value(path.name, str(path), f"{readable} ({_first_line(error)})")) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
