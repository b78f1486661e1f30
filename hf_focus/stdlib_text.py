"""A corpus that every machine has: the source text of Python's standard library (some 30 MB, PSF licence)."""

import json
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

from .errors import FocusDataError, bad_value

# Every n-th file, by the hash of its name, is held out
HELD_OUT = 20


def is_held_out(name: str) -> bool:
    """Whether the file of this relative name belongs to the held-out part: the same on every machine."""
    return int(sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def stdlib_files(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Relative name and text of every Python file of the standard library, shuffled the same way on every machine.

    Args:
        folder: of the library; None: that of the running Python.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in folder.rglob("*.py")
        if not {"site-packages", "__pycache__"} & set(path.relative_to(folder).parts)
    )
    Random(0).shuffle(files)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            # Some tests of the library are files in other encodings on purpose
            continue
        if text.strip():
            yield path.relative_to(folder).as_posix(), text


def write_stdlib_corpus(output_dir: Path, sizes: dict[str, int], folder: Path | None = None) -> dict[str, Path]:
    """Write disjoint parts of the library as JSON lines `{"file": name, "text": text}`.

    Args:
        output_dir: where the files `<part>.jsonl` go.
        sizes: part -> about how many bytes of text; the part `"eval"` takes held-out files, the others the rest.
        folder: of the library; None: that of the running Python.

    Returns:
        part -> its file.

    Raises:
        FocusDataError: the library has less text than asked for.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in sizes}
    missing = dict(sizes)
    for name, text in stdlib_files(folder):
        open_parts = [part for part in parts if missing[part] > 0 and (part == "eval") == is_held_out(name)]
        if open_parts:
            parts[open_parts[0]].append({"file": name, "text": text})
            missing[open_parts[0]] -= len(text.encode())
    for part, left in missing.items():
        if left > 0:
            accepted = f"at most {sizes[part] - left} bytes for {part!r}, which is what this Python's library has left"
            raise FocusDataError(bad_value("sizes", sizes[part], accepted))
    files = {}
    for part, rows in parts.items():
        files[part] = output_dir / f"{part}.jsonl"
        files[part].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
