"""The tasks by name: `TASKS` make up the regret table, `VARIANTS` are the same tasks in other sizes.

`UNSEEN` are others, written after the rules had been chosen. The losses of `SURROGATE` jump, or do not follow their
gradients.
"""

from benchmarks.tasks import images, smooth, surrogate, text, unseen
from benchmarks.tasks.base import Task

_FAMILIES = {
    "images": [*images.TASKS, *images.VARIANTS],
    "text": [*text.TASKS, *text.VARIANTS],
    "smooth": [*smooth.TASKS, *smooth.VARIANTS],
    "unseen": [*unseen.UNSEEN],
    "surrogate": [*surrogate.SURROGATE],
}
_FAMILY_OF = {task.name: label for label, tasks in _FAMILIES.items() for task in tasks}
TASKS: dict[str, Task] = {task.name: task for family in (images, text, smooth) for task in family.TASKS}
VARIANTS: dict[str, Task] = {task.name: task for family in (images, text, smooth) for task in family.VARIANTS}
UNSEEN: dict[str, Task] = {task.name: task for task in unseen.UNSEEN}
SURROGATE: dict[str, Task] = {task.name: task for task in surrogate.SURROGATE}
ALL = TASKS | VARIANTS | UNSEEN | SURROGATE


def family_of(name: str) -> str:
    """Return the name of the module that defines the task called `name`."""
    return _FAMILY_OF[get_task(name).name]


def get_task(name: str) -> Task:
    """Return the task called `name`."""
    if name not in ALL:
        raise ValueError(f"benchmarks: no task {name!r}; there are {', '.join(ALL)}")
    return ALL[name]


__all__ = ["ALL", "SURROGATE", "TASKS", "UNSEEN", "VARIANTS", "Task", "family_of", "get_task"]
