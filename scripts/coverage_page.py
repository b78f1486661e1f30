"""The page that `coverage.py` writes, and what it says read back from it."""

import re
from collections import Counter
from typing import Any

from hf_focus.architecture import declared_architectures
from hf_focus.support import auto_model_types

PROPERTIES = (
    "whole",
    "identity",
    "scores",
    "removal",
    "saving",
    "causality",
    "padding",
    "place",
    "cache",
    "gradients",
)
MARKS = {"yes": "✓", "no:": "✗", "-: ": "–"}
# What a type must have for us to say that it works
NEEDED = ("whole", "identity", "removal", "saving")

HEAD = """# Coverage

Written by `python scripts/coverage.py` with transformers {version}: do not edit. Every model type of every Auto class,
as a tiny model with random weights in float32. {works} of {total} work: {causal} of them are decoders with a cache.

| property | means |
| --- | --- |
| whole | every self-attention that runs has a branch, and it acts |
| identity | patched and untrained, outputs are the plain model's to 1e-5 |
| scores | attention computed from what the branch is given is the model's own: no scale, bias or mask is missing |
| removal | class, config, state dict and outputs are the plain model's again, bit for bit |
| saving | saved and loaded: all weights bit-equal, outputs equal |
| causality | changing a token changes nothing before it |
| padding | padding on the left changes no logits |
| place | the same text further on gives the same logits (–: also where a layer's rotation is not known) |
| cache | in chunks and token by token with a cache, logits are those without |
| gradients | every weight of FocusA has a finite gradient that is not zero |

✓ holds; – does not apply, or the plain model does not have it either; ✗ does not hold. Types marked * have a line or a
file in `patches/`; all others are read from the model itself.
"""


def works(entry: dict[str, Any]) -> bool:
    """Whether a checked type has all the properties that apply to it, and those that always do."""
    properties = entry["properties"]
    fine = all(
        properties.get(name) == "yes" or (name == "identity" and "determ" in properties.get(name, ""))
        for name in NEEDED
    )
    return fine and not any(value.startswith("no") for value in properties.values())


def page(entries: list[dict[str, Any]], version: str) -> str:
    """The page, of the entries of all model types."""
    good = [entry for entry in entries if works(entry)]
    causal = sum(entry["properties"].get("cache") == "yes" for entry in good)
    parts = [HEAD.format(version=version, works=len(good), total=len(entries), causal=causal)]
    parts.append(_mappings(entries))
    declared = declared_architectures()
    lines = [
        f"| type | model | heads | {' | '.join(PROPERTIES)} |",
        f"| --- | --- | --- |{' --- |' * len(PROPERTIES)}",
    ]
    for entry in entries:
        if entry["properties"]:
            marks = " | ".join(MARKS[entry["properties"].get(name, "-: ")[:3]] for name in PROPERTIES)
            star = "*" if entry["model_type"] in declared else ""
            lines.append(f"| `{entry['model_type']}`{star} | {entry['model']} | {entry['heads']} | {marks} |")
    parts.append("## Checked\n\n" + "\n".join(lines) + "\n")
    notes = [
        f"| `{entry['model_type']}` | {name} | {_cell(value[4:])} |"
        for entry in entries
        for name, value in entry["properties"].items()
        if value.startswith("no")
    ]
    if notes:
        parts.append(
            "## What does not hold\n\n| type | property | why |\n| --- | --- | --- |\n" + "\n".join(notes) + "\n"
        )
    for title, status, text in (
        ("Refused", "refused", "`apply_focus` raises `UnsupportedArchitectureError` with this reason."),
        (
            "Patched, and refused when it runs",
            "failed",
            "The error names the module; `FocusConfig(modules=…)` leaves it out.",
        ),
        ("Not run", "not run", "Patched, and no inputs are known here on which the plain tiny model runs."),
        (
            "Not built",
            "not built",
            "No tiny model could be made here: a package is missing, or no small sizes are known.",
        ),
    ):
        rows = [entry for entry in entries if entry["status"] == status and not entry["properties"]]
        if rows:
            lines = [f"| `{entry['model_type']}` | {_cell(entry['reason'])} |" for entry in rows]
            parts.append(f"## {title}\n\n{text}\n\n| type | why |\n| --- | --- |\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _mappings(entries: list[dict[str, Any]]) -> str:
    mappings = auto_model_types()
    good = {entry["model_type"] for entry in entries if works(entry)}
    total, fine = Counter(), Counter()
    for entry in entries:
        for name in mappings.get(entry["model_type"], ()):
            total[name] += 1
            fine[name] += entry["model_type"] in good
    lines = [f"| {name} | {total[name]} | {fine[name]} |" for name in sorted(total)]
    return "## By Auto class\n\n| mapping | types | work |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"`model` got \w+ of model type '[^']*', which FocusA cannot patch: ", "", text)
    # Numbers of a run, and paths of a machine, must not make the page differ from run to run
    text = re.sub(r"/\S+/", "…/", re.sub(r"\b0x[0-9a-f]+", "0x…", text))
    return text.replace("|", "\\|")[:200].rstrip()


def read_page(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The version of transformers that a page was written with, and the marks of each type; none if not checked."""
    version = re.search(r"with transformers (\S+):", text).group(1)
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        name = re.match(r"`([^`]+)`", cells[0]) if line.startswith("| `") else None
        if name is not None:
            marks = cells[3:] if len(cells) == 3 + len(PROPERTIES) else []
            found.setdefault(name.group(1), dict(zip(PROPERTIES, marks, strict=False)))
    return version, found
