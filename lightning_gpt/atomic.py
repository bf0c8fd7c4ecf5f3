"""Replace a file or a folder safely: write beside it, flush to disk, swap it in on success, remove it on error."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends without an error.

    Two processes may write the same path at the same time: each writes a file of its own, and the last one wins.

    Args:
        path: The file to create or replace; its folder must exist.
        mode: "wb" for bytes, "w" for UTF-8 text.

    Raises:
        OSError: The file cannot be written; `path` is as it was before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            sync(file)
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def swap_in(part: Path, path: Path) -> None:
    """Move a finished file or folder to `path`, replacing a file or folder there.

    A folder cannot be replaced in one step: the old one is first moved to `path` + ".old", where a reader finds it if
    the machine dies in between.
    """
    old = path.with_name(f"{path.name}.old")
    if path.exists():
        remove(old)
        if path.is_dir() or part.is_dir():
            path.rename(old)
    part.replace(path)
    sync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path` against other processes and threads; a crash releases it.

    Args:
        path: The lock file, created if needed. Where the file system refuses locks, the block runs unlocked.
        wait: Whether to wait for the holder.

    Raises:
        filelock.Timeout: Another process holds the lock and `wait` is False.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise
        except (OSError, NotImplementedError):  # a read-only folder, a network file system without locks
            pass
        yield
