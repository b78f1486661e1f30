"""The table of tasks that a model can be fine-tuned for. A new task is a new entry."""

from .errors import FocusConfigError, bad_value
from .task_labels import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from .task_seq2seq import SEQ2SEQ, SPEECH_RECOGNITION
from .task_spans import QUESTION_ANSWERING
from .task_text import CAUSAL_LM, MASKED_LM
from .task_types import Task

TASKS = {
    task.name: task
    for task in (
        CAUSAL_LM,
        MASKED_LM,
        SEQUENCE_CLASSIFICATION,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        SEQ2SEQ,
        SPEECH_RECOGNITION,
    )
}


def find_task(name: str) -> Task:
    """The entry of a task.

    Raises:
        FocusConfigError: there is none.
    """
    if name not in TASKS:
        raise FocusConfigError(bad_value("task", name, "one of " + ", ".join(TASKS)))
    return TASKS[name]
