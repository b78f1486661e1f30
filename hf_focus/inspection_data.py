"""The texts that `hf-focus inspect` measures on."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from .arguments import DataArguments
from .data import find_text_column
from .errors import FocusDataError, bad_value
from .scoring import evaluation_rows
from .stdlib_text import is_held_out, stdlib_files

# Where nothing else is asked for
DEFAULT_TEXTS = 8


def choose_texts(files: Sequence[str] | None, data: DataArguments) -> tuple[list[str], str]:
    """Texts to measure on, at most `data.max_eval_examples`, and what to call them.

    Args:
        files: text files of any kind; the first choice.
        data: names what evaluation would use; the second. With neither: source files of Python's standard library.

    Raises:
        FocusDataError: a file or data set is missing or empty.
    """
    count = data.max_eval_examples or DEFAULT_TEXTS
    if files:
        for name in files:
            if not Path(name).is_file():
                raise FocusDataError(bad_value("text", name, "an existing file"))
        texts = [Path(name).read_text(encoding="utf-8", errors="replace") for name in files[:count]]
        return texts, _named(files[:count])
    if data.eval_files or data.dataset or data.train_files:
        rows = evaluation_rows(data)
        texts = rows[:count][find_text_column(rows, data.text_column)]
        return [text or "" for text in texts], _named(data.eval_files or data.train_files or [data.dataset])
    held_out = (text for name, text in stdlib_files() if is_held_out(name))
    return list(islice(held_out, count)), "files of Python's standard library"


def without_folders(name: str) -> str:
    """A page may be shared, and need not tell where things lie on this machine."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(without_folders, names))
