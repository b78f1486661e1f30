"""The metrics that come with hf_focus, as `evaluate` modules; they load without a network."""

from pathlib import Path
from uuid import uuid4

import evaluate

from .errors import FocusConfigError, bad_value

METRICS = ("perplexity", "accuracy", "entities", "answers", "wer")


def load_metric(name: str) -> evaluate.EvaluationModule:
    """An `evaluate` module by its short name.

    ```python
    metric = load_metric("perplexity")
    metric.add_batch(predictions=[41.2, 38.0], tokens=[16, 16], bytes=[70, 64])
    metric.compute()          # {"loss": ..., "perplexity": ..., "bits_per_byte": ...}
    ```

    Args:
        name: one of `METRICS`.

    Raises:
        FocusConfigError: another name.
    """
    if name not in METRICS:
        raise FocusConfigError(bad_value("metric", name, "one of " + ", ".join(METRICS)))
    path = Path(__file__).parent / f"metric_{name}.py"
    # In memory, and under an id of its own: two runs at the same time would share a file of scores
    return evaluate.load(str(path), experiment_id=uuid4().hex, keep_in_memory=True)
