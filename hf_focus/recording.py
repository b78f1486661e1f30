"""`record_focus`: what FocusA does while a model runs, for users."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .branch import FocusBranch
from .errors import NotPatchedError
from .observers import FocusRecord, observe


@dataclass
class FocusRecords:
    """Records by layer: `records["model.layers.0.self_attn"]` is the list of that layer's calls, in order."""

    layers: dict[str, list[FocusRecord]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> list[FocusRecord]:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextmanager
def record_focus(model: nn.Module) -> Iterator[FocusRecords]:
    """Record spans, entropy, coverage, iterations and actions of every FocusA layer of `model`.

    ```python
    with record_focus(model) as records:
        model(**inputs)
    records["model.layers.0.self_attn"][0].span      # (B, H, T), in tokens
    ```

    Raises:
        NotPatchedError: the model has no FocusA layer.
    """
    # PEFT holds several branches of a layer behind one name
    names = {
        id(module): path.partition(".focus")[0]
        for path, module in model.named_modules()
        if isinstance(module, FocusBranch)
    }
    if not names:
        raise NotPatchedError(f"`model` got {type(model).__name__}; accepted: a model with FocusA layers.")
    records = FocusRecords({name: [] for name in names.values()})

    def keep(branch: nn.Module, record: FocusRecord) -> None:
        if id(branch) in names:
            records[names[id(branch)]].append(record.detach())

    with observe(keep):
        yield records
