"""The tasks by name: `TASKS` make up the regret table, `VARIANTS` are the same tasks in other sizes.

`UNSEEN` are others, written after the rules had been chosen.
"""

from benchmarks.tasks import images, smooth, text, unseen
from benchmarks.tasks.base import Task

_FAMILIES = {"images": images, "text": text, "smooth": smooth}
TASKS: dict[str, Task] = {task.name: task for family in _FAMILIES.values() for task in family.TASKS}
VARIANTS: dict[str, Task] = {task.name: task for family in _FAMILIES.values() for task in family.VARIANTS}


UNSEEN: dict[str, Task] = {task.name: task for task in unseen.UNSEEN}
_ALL = TASKS | VARIANTS | UNSEEN


def family_of(name: str) -> str:
    """Return the name of the module that defines the task called `name`."""
    task = get_task(name)
    if name in UNSEEN:
        return "unseen"
    return next(label for label, family in _FAMILIES.items() if task in [*family.TASKS, *family.VARIANTS])


def get_task(name: str) -> Task:
    """Return the task called `name`."""
    if name not in _ALL:
        raise ValueError(f"benchmarks: no task {name!r}; there are {', '.join(_ALL)}")
    return _ALL[name]


__all__ = ["TASKS", "UNSEEN", "VARIANTS", "Task", "family_of", "get_task"]
