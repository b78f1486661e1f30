"""The modules that PEFT adapts where nobody says which: it goes by model type, and a patched model has its own."""

try:
    from peft.utils import constants
except ImportError:
    constants = None

# Default modules of LoRA and its relatives, and what goes with them
_TABLES = [
    table
    for name, table in (vars(constants) if constants else {}).items()
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING")
]


def name_targets(model_type: str, like: str) -> None:
    """Let PEFT, where it is installed, adapt the same modules of a model type as of another."""
    for table in _TABLES:
        if like in table:
            table[model_type] = table[like]
