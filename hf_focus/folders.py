"""Model folders: loaded by the class that saved them, and written beside their place, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .errors import FocusConfigError, FocusError, bad_value
from .focus_configs import FocusConfigMixin
from .modeling import focus_model_class

# What lies beside the weights and belongs to the model: tokenizers, processors, generation
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "tekken.json",
    "target_vocab.json",
    "entity_vocab.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
    # What sentence-transformers makes of the model's output
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "generation_config.json",
)


def _check_place(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    # Whatever else is there, a mistyped name shall not delete it
    replaceable = path.is_dir() and ((path / "config.json").is_file() or not any(path.iterdir()))
    if not overwrite or not replaceable:
        accepted = "a name that is still free; --overwrite replaces an empty folder or a model's (with config.json)"
        raise FocusConfigError(bad_value("out", str(path), accepted))


@contextmanager
def written_beside(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into; it takes the name `path` when the `with` ends, and is gone if that fails.

    ```python
    with written_beside("out") as folder:
        model.save_pretrained(folder)
    ```

    Args:
        path: where the folder shall be; missing parents are made.
        overwrite: replace a model's folder, or an empty one, that is there.

    Raises:
        FocusConfigError: `path` exists and may not be replaced; if it did so before, nothing is written.
    """
    # A link is replaced where it points to
    path = Path(path).resolve()
    _check_place(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid4().hex[:8]
    # Beside: a rename is only one step within a file system
    new, old = (path.with_name(f".{path.name}.{unique}.{end}") for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        # Somebody else may have taken the name meanwhile
        _check_place(path, overwrite)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text_beside(path: str | Path, text: str) -> None:
    """Write a file whole or not at all; one that is there is replaced."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid4().hex[:8]}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def find_model_class(config: PreTrainedConfig, asked: str | None = None) -> type:
    """The class to load a model with: the one it was saved by, unless another is asked for.

    Args:
        config: of the model.
        asked: name of an Auto class or model class of transformers; None: `config.architectures` says.

    Raises:
        FocusConfigError: there is no such class, or the config names none.
    """
    name = asked or next(iter(config.architectures or ()), None)
    patched = isinstance(config, FocusConfigMixin)
    if name is not None and patched:
        name = name.removeprefix("Focus")
    found = getattr(transformers, name, None) if name else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model and not hasattr(found, "_model_mapping"):
        accepted = "a class of transformers, such as AutoModelForCausalLM; --auto-class names it"
        raise FocusConfigError(bad_value("auto_class", name, accepted))
    return focus_model_class(found) if is_model and patched else found


def load_model(
    name: str, asked: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with the class and the dtype it was saved with, in eval mode.

    Args:
        name: id on the Hub, or folder.
        asked: see `find_model_class`.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run model code that comes with the model.

    Raises:
        FocusError: it is not found, or cannot be loaded.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        return find_model_class(config, asked).from_pretrained(name, config=config, dtype="auto", **options)
    except FocusError:
        raise
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error


def copy_companions(name: str, folder: Path, revision: str | None = None) -> list[str]:
    """Copy tokenizer, processor and generation files of a model, as they are, where `folder` has none of that name.

    Args:
        name: id on the Hub, or folder.
        folder: of the new model.
        revision: branch, tag or commit on the Hub.

    Returns:
        the names of the files copied, sorted.

    Raises:
        FocusConfigError: they cannot be downloaded.
    """
    source = Path(name)
    if not source.is_dir():
        try:
            source = Path(snapshot_download(name, revision=revision, allow_patterns=list(COMPANIONS)))
        except (OSError, ValueError) as error:
            raise _not_found(name, error) from error
    found = {path.relative_to(source) for name in COMPANIONS for path in source.glob(name) if path.is_file()}
    copied = sorted(path.as_posix() for path in found if not (folder / path).exists())
    for file in copied:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    return copied


def _not_found(name: str, error: Exception) -> FocusConfigError:
    reason = str(error).strip().partition("\n")[0]
    return FocusConfigError(bad_value("model", name, f"an id on the Hub or a folder with a model ({reason})"))
