"""The registry of tasks: generated questions and answers, which `--data` can name instead of a text.

A task is one file with a frozen dataclass that subclasses `Task`, and a row in `TASKS`. Its fields become flags. A
user's own task needs no row.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from lightning_gpt.config import UserError

if TYPE_CHECKING:
    from lightning_gpt.data.tasks.base import Task

TASKS: dict[str, str] = {
    "adder": "lightning_gpt.data.tasks.adder:Adder",
    "sort": "lightning_gpt.data.tasks.sort:Sort",
}


def find_task(data: str) -> type[Task] | None:
    """Import the task that `--data` names.

    Args:
        data: A key of `TASKS`, or `package.module:Class` for a user's own task. `./adder` means a file or folder.

    Returns:
        The class, or None if `data` has neither form or names an existing file.

    Raises:
        UserError: The module or class does not exist, or is not a task.
    """
    module_name, _, class_name = TASKS.get(data, data).partition(":")
    is_dotted = all(part.isidentifier() for part in (*module_name.split("."), class_name))
    if not is_dotted or module_name == "chargpt" or (data not in TASKS and os.path.exists(data)):
        return None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # Python adds the script's folder only
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        known = ", ".join(TASKS)
        raise UserError(
            f"--data {data}: {error}; give a text, chargpt:FILE, one of the tasks {known}, or package.module:Class of"
            " your own"
        ) from error
    from lightning_gpt.data.tasks.base import Task  # imports torch, which --help must not

    task = getattr(module, class_name, None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"--data {data}: {module_name} has no subclass of Task called {class_name}")
    return task
