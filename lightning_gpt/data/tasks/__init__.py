"""The registry of tasks: what `--data` can name in the place of a text, to learn answers to questions.

A task is a file with one frozen dataclass, a subclass of `Task`, whose fields become flags, and a row in `TASKS`; one
of a user's own needs no row.
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
    """The task that `--data` names.

    Args:
        data: A key of `TASKS`, or `package.module:Class` for a task of a user's own; write `./adder` for a file or
            folder of that name.

    Returns:
        Its class, imported now; None where `data` has neither form, or is a file with a dotted name.

    Raises:
        UserError: There is no such module or class, or it is no task.
    """
    module_name, _, class_name = TASKS.get(data, data).partition(":")
    is_dotted = all(part.isidentifier() for part in (*module_name.split("."), class_name))
    if not is_dotted or module_name == "chargpt" or (data not in TASKS and os.path.exists(data)):
        return None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is on the path, the folder it is called from is not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        known = ", ".join(TASKS)
        raise UserError(
            f"--data {data}: {error}; give a text, chargpt:FILE, one of the tasks {known}, or package.module:Class for"
            " a task of your own in this folder"
        ) from error
    from lightning_gpt.data.tasks.base import Task  # imports torch, which --help need not wait for

    task = getattr(module, class_name, None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"--data {data}: {module_name} has no subclass of Task called {class_name}")
    return task
