"""What may run code: checkpoints of runs made on this machine, and names of code that the user typed."""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from lightning_gpt.atomic import atomic_file, locked
from lightning_gpt.config import UserError, cache_root

# What a run writes into its folder ``checkpoints``, and what is converted from that: best.ckpt, best/, last.ckpt.old.
_OF_A_RUN = re.compile(r"(best|last|step)[\w=-]*(\.ckpt)?(\.old)?")

# The file whose content is being turned into objects, and the names in it that may be imported.
_reading: ContextVar[tuple[Path, Collection[str]] | None] = ContextVar("_reading", default=None)


# Own runs


def _list_file() -> Path:
    return cache_root() / "runs.txt"


def remember_run(run_dir: Path) -> None:
    """Add a run folder to the list of own runs; do nothing if the cache folder cannot be written."""
    line = str(run_dir.resolve())
    with contextlib.suppress(OSError):
        file = _list_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}.lock")):
            known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            if line not in known and line.splitlines() == [line]:
                with atomic_file(file, mode="w") as out:
                    out.writelines(f"{run}\n" for run in [*known, line])


def is_own(path: Path) -> bool:
    """Return whether a path is a checkpoint or ``config.yaml`` of a run made on this machine.

    Args:
        path: ``RUN/checkpoints/NAME`` with a name that a run writes, or ``RUN/config.yaml``.
    """
    path = path.resolve()
    if path.name == "config.yaml":
        run = path.parent
    elif path.parent.name == "checkpoints" and _OF_A_RUN.fullmatch(path.name):
        run = path.parent.parent
    else:
        return False
    try:
        return str(run) in _list_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


# Names of code


def split_name(name: str) -> tuple[str, str] | None:
    """Split ``package.module:Class`` into module and class; return None if the text does not have this form."""
    module, _, attribute = name.partition(":")
    return (module, attribute) if all(part.isidentifier() for part in (*module.split("."), attribute)) else None


def require_honoured(name: str, *, flag: str, source: Path, trust: bool, typed: Collection[str] | None = None) -> None:
    """Check that code which a file names may run.

    Importing runs code, and the working directory, where a download may lie, is searched for modules.

    Args:
        name: The name of the code.
        flag: The option it is a value of, without dashes.
        source: The file.
        trust: Whether the file is trusted.
        typed: Names that the user typed in this command; None if the command has no such option.

    Raises:
        UserError: The name is neither typed nor trusted.
    """
    if trust or name in (typed or ()):
        return
    way = "give" if typed is None else f"type --{flag} {name} to allow it, or give"
    raise UserError(
        f"{source} asks for code, --{flag} {name}, which may have come with it; {way} --trust_checkpoint if you trust"
        " who made it"
    )


@contextlib.contextmanager
def reading_from(source: Path, *, typed: Collection[str]) -> Iterator[None]:
    """Let ``import_code`` refuse all names but `typed`, while a library builds objects from a file that is not own."""
    token = _reading.set(None if is_own(source) else (source, typed))
    try:
        yield
    finally:
        _reading.reset(token)


def import_code(name: str, *, flag: str, hint: str) -> tuple[ModuleType, str]:
    """Import the module of ``package.module:Class``, from the working directory as well.

    Args:
        name: The name.
        flag: The option it is a value of, without dashes.
        hint: What to give instead, for the error message.

    Returns:
        The module, and the name of the class.

    Raises:
        UserError: There is no such module, or ``reading_from`` refuses it.
    """
    found = split_name(name)
    assert found is not None
    if reading := _reading.get():
        require_honoured(name, flag=flag, source=reading[0], trust=False, typed=reading[1])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # Python adds only the script's folder
    try:
        return importlib.import_module(found[0]), found[1]
    except ModuleNotFoundError as error:
        raise UserError(f"--{flag} {name}: {error}; {hint}") from error
