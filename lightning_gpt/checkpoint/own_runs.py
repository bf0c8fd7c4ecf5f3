"""The list of run folders made on this machine, whose checkpoints are trusted without ``--trust_checkpoint``."""

import contextlib
from pathlib import Path

from lightning_gpt.atomic import atomic_file, locked
from lightning_gpt.config import cache_root


def _list_file() -> Path:
    return cache_root() / "runs.txt"


def remember_run(run_dir: Path) -> None:
    """Add a run folder to the list; do nothing if the cache folder cannot be written."""
    line = str(run_dir.resolve())
    with contextlib.suppress(OSError):
        file = _list_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}.lock")):
            known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            if line not in known:
                with atomic_file(file, mode="w") as out:
                    out.writelines(f"{run}\n" for run in [*known, line])


def is_own(path: Path) -> bool:
    """Return whether a checkpoint is in a listed run folder."""
    try:
        known = _list_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(path.resolve().is_relative_to(run) for run in known if run)
