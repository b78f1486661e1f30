"""Checks of a folder before it is shared and after it is fetched: that it is whole, loads, and tells no paths."""

import json
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from getpass import getuser
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .card_checks import is_hub_id, read_card
from .cards import CARD_FILE
from .configuration import FocusConfig
from .errors import FocusCheckpointError, FocusConfigError, FocusError, FocusHubError, bad_value
from .focus_configs import MODEL_TYPE_PREFIX, focus_config_class
from .folders import COMPANIONS
from .modeling import focus_model_class

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
# As hf_focus registers them with PEFT, which need not be installed here
FOCUS_ADAPTERS = ("FOCUS", "FOCUS_LORA")
# Of the cards that transformers and PEFT put where there is none: they say nothing
_PLACEHOLDERS = ("This model card has been automatically generated", "Model Card for Model ID")

Shapes = dict[str, tuple[int, ...]]

# What belongs to a shared model: everything else in the folder (checkpoints, trackers, pickles) stays where it is
SHARED = (
    "*.safetensors",
    "*.safetensors.index.json",
    CONFIG_FILE,
    ADAPTER_FILE,
    *COMPANIONS,
    "additional_chat_templates/*.jinja",
    # The code that reads it, the card and its pictures
    "*.py",
    "*.md",
    "*.png",
    "*.svg",
    "LICENSE*",
    "NOTICE*",
    "train_log.jsonl",
)
_BINARY = ("*.safetensors", "*.model", "*.spm", "*.png")
# Words of a language, not of this machine
_VOCABULARY = ("*vocab*", "merges.txt", "added_tokens.json", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt")


@dataclass(frozen=True)
class _Weights:
    """The names that weights of one kind of folder have."""

    single: str
    shards: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


WEIGHTS = {
    "model": _Weights("model.safetensors", "model-?????-of-?????.safetensors"),
    "adapter": _Weights("adapter_model.safetensors", "adapter_model-?????-of-?????.safetensors"),
}
_ANY_WEIGHTS = (*WEIGHTS.values(), _Weights("pytorch_model.bin", "pytorch_model-?????-of-?????.bin"))


@dataclass(frozen=True)
class SharedFolder:
    """A folder that passed every check.

    kind: a full model, or a PEFT adapter. files: what belongs to it, relative to `path`. config: config.json, or
    adapter_config.json. card: None where there is no README.md, or one that says nothing.
    """

    path: Path
    kind: Literal["model", "adapter"]
    files: tuple[str, ...]
    config: dict[str, Any]
    card: ModelCard | None


def is_weight_file(name: str) -> bool:
    """Whether a repository's file holds weights, or their index, of a model or an adapter as a whole."""
    return any(name in (kind.single, kind.index) or fnmatchcase(name, kind.shards) for kind in _ANY_WEIGHTS)


def check_folder(folder: str | Path) -> SharedFolder:
    """Check that a folder holds a whole FocusA model or adapter that `from_pretrained` would load.

    Reads config.json, the card, and the headers of the weights, not the weights; the model is built without memory.

    Raises:
        FocusCheckpointError: no folder, no FocusA in it, a config.json that makes no model, or weights that are
            truncated, missing, or of another model.
        FocusConfigError: the card's metadata, or an adapter's base model, is nothing that the Hub accepts.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FocusCheckpointError(bad_value("folder", str(folder), "a folder that save_pretrained wrote"))
    found = [name for name in (CONFIG_FILE, ADAPTER_FILE) if (path / name).is_file()]
    if len(found) != 1:
        accepted = f"a folder with either {CONFIG_FILE} (a model) or {ADAPTER_FILE} (an adapter)"
        raise FocusCheckpointError(bad_value("folder", str(folder), accepted))
    kind = "model" if found == [CONFIG_FILE] else "adapter"
    config = read_json(path / found[0])
    check = _check_model if kind == "model" else _check_adapter
    check(path, config)
    card = path / CARD_FILE
    has_card = card.is_file() and not is_placeholder(card)
    return SharedFolder(path, kind, tuple(_shared_files(path)), config, read_card(card) if has_card else None)


def is_placeholder(card: Path) -> bool:
    """Whether a README.md is the one that transformers or PEFT write where there is none."""
    text = card.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in _PLACEHOLDERS)


def is_focus_config(config: dict[str, Any]) -> bool:
    """Whether config.json or adapter_config.json, as read, is FocusA's."""
    model_type, peft_type = config.get("model_type"), config.get("peft_type")
    is_model = isinstance(model_type, str) and model_type.startswith(MODEL_TYPE_PREFIX)
    return is_model or peft_type in FOCUS_ADAPTERS


def _shared_files(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        # `*` of a pattern would match across folders: checkpoints lie below
        if file.is_file() and any(
            fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in SHARED
        ):
            yield name


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        FocusCheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FocusCheckpointError(bad_value(path.name, str(path), f"a readable JSON file ({error})")) from error
    if not isinstance(content, dict):
        raise FocusCheckpointError(bad_value(path.name, type(content).__name__, "a JSON object"))
    return content


def _check_model(path: Path, config: dict[str, Any]) -> None:
    if not is_focus_config(config):
        accepted = f"a FocusA model's, {MODEL_TYPE_PREFIX}…; apply_focus makes one"
        raise FocusCheckpointError(bad_value(f"{CONFIG_FILE}: model_type", config.get("model_type"), accepted))
    saved = read_shapes(path, WEIGHTS["model"])
    expected, tied = _shapes_of_model(config, len(saved))
    missing = set(expected) - set(saved) - tied
    unexpected = set(saved) - set(expected)
    reshaped = {name for name in set(saved) & set(expected) if saved[name] != expected[name]}
    found = {"missing": missing, "not of this model": unexpected, "of another shape": reshaped}
    shown = [f"{what}: {', '.join(sorted(names)[:3])} ({len(names)})" for what, names in found.items() if names]
    if shown:
        accepted = "the config.json that was saved with the weights"
        raise FocusCheckpointError(bad_value(CONFIG_FILE, f"weights that do not fit it, {'; '.join(shown)}", accepted))


def _check_adapter(path: Path, config: dict[str, Any]) -> None:
    if not is_focus_config(config):
        accepted = f"{' or '.join(FOCUS_ADAPTERS)}: an adapter with FocusA"
        raise FocusCheckpointError(bad_value(f"{ADAPTER_FILE}: peft_type", config.get("peft_type"), accepted))
    FocusConfig.from_dict(config.get("focus_config"))
    if not any(".focus." in name for name in read_shapes(path, WEIGHTS["adapter"])):
        raise FocusCheckpointError(bad_value("folder", str(path), "an adapter with weights of FocusA"))
    base = config.get("base_model_name_or_path")
    if not is_hub_id(base):
        accepted = "the id of a model on the Hub: nobody else has what lies on this machine"
        raise FocusConfigError(bad_value(f"{ADAPTER_FILE}: base_model_name_or_path", base, accepted))


def read_shapes(path: Path, weights: _Weights) -> Shapes:
    """Name -> shape of every tensor in a folder's safetensors files, read from their headers.

    Raises:
        FocusCheckpointError: no weights, both single and sharded ones, a file that is truncated or whose header is
            wrong, or files that differ from what the index says.
    """
    single, index = path / weights.single, path / weights.index
    shards = sorted(file.name for file in path.glob(weights.shards))
    if single.is_file() == index.is_file() or (shards and not index.is_file()):
        accepted = f"either {single.name}, or {index.name} and its shards"
        names = [file.name for file in (single, index) if file.is_file()] + shards[:3]
        raise FocusCheckpointError(bad_value("weights", names, accepted))
    if single.is_file():
        return _read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FocusCheckpointError(bad_value(f"{index.name}: weight_map", weight_map, "tensor names to file names"))
    if sorted(set(weight_map.values())) != shards:
        accepted = f"the files that {index.name} names: {', '.join(sorted(set(weight_map.values())))}"
        raise FocusCheckpointError(bad_value("weights", shards, accepted))
    shapes: Shapes = {}
    for shard in shards:
        header = _read_header(path / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if set(header) != listed:
            differing = ", ".join(sorted(set(header) ^ listed)[:3])
            raise FocusCheckpointError(
                bad_value(shard, f"tensors {differing}", f"the tensors that {index.name} lists")
            )
        shapes |= header
    return shapes


def _read_header(file: Path) -> Shapes:
    try:
        # Opening compares the header's offsets with one another and with the file's size
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        accepted = f"a whole safetensors file ({error}); fetch or save it again"
        raise FocusCheckpointError(bad_value(file.name, f"{file.stat().st_size} bytes", accepted)) from error


def _shapes_of_model(config: dict[str, Any], tensors: int) -> tuple[Shapes, set[str]]:
    """Names and shapes that a config's model saves, and the names that it need not save."""
    try:
        model = _build_empty(config, tensors)
        # As it is saved: some architectures' tensors have other names in files than in memory
        state = revert_weight_conversion(model, model.state_dict())
        unsaved = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        tied = revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k in unsaved})
    except FocusError:
        raise
    # Whatever a config of nonsense makes a model's constructor raise
    except Exception as error:
        accepted = f"values that make a model ({type(error).__name__}: {' '.join(str(error).split())})"
        raise FocusCheckpointError(bad_value(CONFIG_FILE, config.get("model_type"), accepted)) from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, set(tied)


def _build_empty(values: dict[str, Any], tensors: int) -> PreTrainedModel:
    model_type = values["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    if model_type not in CONFIG_MAPPING:
        raise FocusCheckpointError(
            bad_value(f"{CONFIG_FILE}: model_type", values["model_type"], "an architecture of transformers")
        )
    config = focus_config_class(CONFIG_MAPPING[model_type]).from_dict(values)
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    base = getattr(transformers, name.removeprefix("Focus"), None) if name else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise FocusCheckpointError(
            bad_value(f"{CONFIG_FILE}: architectures", names, "a list of one model class of transformers")
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        # Building them would take as long as the number says
        raise FocusCheckpointError(
            bad_value(f"{CONFIG_FILE}: number of layers", layers, f"no more than the weights hold, {tensors} tensors")
        )
    with torch.device("meta"):
        return focus_model_class(base)(config)


def find_traces(folder: SharedFolder) -> list[tuple[str, str]]:
    """Paths and names of this machine in a folder's text files: (file, what was found there)."""
    pattern = _trace_pattern(folder.path)
    found = []
    for name in folder.files:
        if not any(fnmatchcase(name, kind) for kind in (*_BINARY, *_VOCABULARY)):
            for match in pattern.finditer(_text_of(folder.path / name)):
                found.append((name, match[0]))
    return found


def refuse_traces(folder: SharedFolder) -> None:
    """Raise where a text file of the folder tells a path or a name of this machine.

    Raises:
        FocusHubError: it names the files, and what stands in them.
    """
    found = find_traces(folder)
    if found:
        shown = "; ".join(f"{name}: {text}" for name, text in found[:3])
        raise FocusHubError(bad_value("folder", shown, "files that tell no paths, users or hosts of this machine"))


def _text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name != "tokenizer.json":
        return text
    # Its vocabulary is words too; the settings around it are not
    content = json.loads(text)
    return json.dumps({name: value for name, value in content.items() if name not in ("model", "added_tokens")})


def _trace_pattern(folder: Path) -> re.Pattern[str]:
    """Matches home folders of any machine, and this machine's paths, `user@` and host name."""
    host = socket.gethostname()
    places = {Path.home(), Path.cwd(), folder.resolve(), folder.resolve().parent}
    # The root is no trace, and /tmp alone is the same everywhere
    known = sorted((str(place) for place in places - {Path("/"), Path(tempfile.gettempdir())}), key=len, reverse=True)
    escaped = [re.escape(form) for path in known for form in {path, json.dumps(path)[1:-1]}]
    alternatives = [
        rf"(?<![\w.-])(?:{'|'.join(escaped)})(?![\w-])[^\s\"'`)]*",
        # Of other machines too: a folder may have been copied from one
        r"(?<![\w.-])(?:/home/|/Users/|/root/|/tmp/|/var/folders/|/scratch/)[\w.-]+[^\s\"'`)]*",
        r"(?i:\b[a-z]:\\{1,2}users\\{1,2}[\w.-]+)",
    ]
    # A user name alone may be a word of any text
    with suppress(OSError, KeyError):
        alternatives.append(rf"\b{re.escape(getuser())}@[\w.-]+")
    # `localhost` and the like are words that anybody may write
    if re.search(r"[\d.-]", host):
        alternatives.append(rf"(?<![\w.-]){re.escape(host)}(?![\w-])")
    return re.compile("|".join(alternatives))
