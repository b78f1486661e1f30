"""All tasks of the evidence by name. A new task is a new entry in one of these modules' lists."""

from .errors import FocusConfigError, bad_value
from .evidence_tasks_hierarchy import TASKS as HIERARCHY
from .evidence_tasks_lookup import TASKS as LOOKUP
from .evidence_tasks_needles import TASKS as NEEDLES
from .evidence_tasks_recall import TASKS as RECALL
from .evidence_tasks_text import TASKS as TEXT
from .evidence_types import Task

TASKS: dict[str, Task] = {task.name: task for task in (*LOOKUP, *RECALL, *HIERARCHY, *NEEDLES, *TEXT)}


def find_task(name: str) -> Task:
    """A task by name.

    Raises:
        FocusConfigError: there is none of this name.
    """
    if name not in TASKS:
        raise FocusConfigError(bad_value("task", name, ", ".join(TASKS)))
    return TASKS[name]
