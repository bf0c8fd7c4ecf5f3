"""The registry of tasks: generated questions and answers, which `--data` can name instead of a text.

A task is one file with a frozen dataclass that subclasses `Task`, and a row in `TASKS`. Its fields become flags. A
user's own task needs no row.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning_gpt.config import UserError
from lightning_gpt.trust import import_code, split_name

if TYPE_CHECKING:
    from lightning_gpt.data.tasks.base import Task

TASKS: dict[str, str] = {
    "adder": "lightning_gpt.data.tasks.adder:Adder",
    "sort": "lightning_gpt.data.tasks.sort:Sort",
}


def is_own_task(data: str) -> bool:
    """Return whether `--data` names a task of the user's, `package.module:Class`, and no existing file."""
    parts = split_name(data)
    return parts is not None and parts[0] != "chargpt" and not os.path.exists(data)


def find_task(data: str) -> type[Task] | None:
    """Import the task that `--data` names.

    Args:
        data: A key of `TASKS`, or `package.module:Class` for a user's own task. `./adder` means a file or folder.

    Returns:
        The class, or None if `data` has neither form or names an existing file.

    Raises:
        UserError: The module or class does not exist, or is not a task.
    """
    if data not in TASKS and not is_own_task(data):
        return None
    module, class_name = import_code(
        TASKS.get(data, data),
        flag="data",
        hint=f"give a text, chargpt:FILE, one of the tasks {', '.join(TASKS)}, or package.module:Class of your own",
    )
    from lightning_gpt.data.tasks.base import Task  # imports torch, which --help must not

    task = getattr(module, class_name, None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"--data {data}: {module.__name__} has no subclass of Task called {class_name}")
    return task
