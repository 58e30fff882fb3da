"""The tasks by name: `TASKS` make up the regret table, `VARIANTS` are the same tasks in other sizes.

`UNSEEN` are others, written after the rules had been chosen.
"""

from benchmarks.tasks import images, smooth, text, unseen
from benchmarks.tasks.base import Task

_FAMILIES = {
    "images": [*images.TASKS, *images.VARIANTS],
    "text": [*text.TASKS, *text.VARIANTS],
    "smooth": [*smooth.TASKS, *smooth.VARIANTS],
    "unseen": [*unseen.UNSEEN],
}
_FAMILY_OF = {task.name: label for label, tasks in _FAMILIES.items() for task in tasks}
TASKS: dict[str, Task] = {task.name: task for family in (images, text, smooth) for task in family.TASKS}
VARIANTS: dict[str, Task] = {task.name: task for family in (images, text, smooth) for task in family.VARIANTS}
UNSEEN: dict[str, Task] = {task.name: task for task in unseen.UNSEEN}
ALL = TASKS | VARIANTS | UNSEEN


def family_of(name: str) -> str:
    """Return the name of the module that defines the task called `name`."""
    return _FAMILY_OF[get_task(name).name]


def get_task(name: str) -> Task:
    """Return the task called `name`."""
    if name not in ALL:
        raise ValueError(f"benchmarks: no task {name!r}; there are {', '.join(ALL)}")
    return ALL[name]


__all__ = ["ALL", "TASKS", "UNSEEN", "VARIANTS", "Task", "family_of", "get_task"]
