"""Replace files and folders so that a crash loses nothing: write beside the target, flush to disk, rename.

Names of unfinished files and folders end in `.part`; nothing reads them.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from lightning_gpt.config import UserError

_PART = ".part"
_STALE_SECONDS = 24 * 3600


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends without an error.

    Several processes may write the same path: each writes a hidden file of its own, and the last to finish wins. A
    killed process leaves that hidden file, which a later call deletes once it is a day old. For a large file with a
    single writer, write `NAME.part` and `swap_in` it: the next save then overwrites an unfinished one.

    Args:
        path: The file to create or replace, in an existing folder. A symbolic link is followed; a device or pipe is
            written directly.
        mode: "wb" for bytes, "w" for UTF-8 text with Unix line ends.

    Raises:
        OSError: The file cannot be written; `path` still has its old content.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, mode, encoding=encoding, newline=newline) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    _remove_stale_parts(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with open(part, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            sync(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def _remove_stale_parts(path: Path) -> None:
    for part in path.parent.glob(f".{glob.escape(path.name)}.????????{_PART}"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()


def swap_in(part: Path, path: Path, *, old: Path | None = None) -> None:
    """Flush a finished file or folder to disk and move it to `path`, replacing what is there.

    A file is replaced by one rename. A folder takes two: `path` to `old`, then `part` to `path`. After a kill between
    them `part` and `old` are both complete: readers take `old` where `path` is missing, and the next swap keeps it
    until `path` exists again. The folder is flushed after each rename, so that a power cut does not reorder them.

    Args:
        part: The finished file or folder, on the same file system as `path`.
        path: The file or folder to create or replace.
        old: Temporary name of the replaced folder (default: `path` + ".old"). An existing file or folder of this name
            is deleted, so it must not be a user's.

    Raises:
        OSError: The disk failed; `path` or `old` is complete.
    """
    old = old or path.with_name(f"{path.name}.old")
    _sync_tree(part)
    if path.is_dir() or (part.is_dir() and path.exists()):
        remove(old)
        os.replace(path, old)
        sync_folder(path.parent)
    os.replace(part, path)
    sync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder with its content, if it exists.

    A folder is renamed first, so that a kill or power cut never leaves a half-deleted folder under its own name.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path
    if path.suffix != _PART:
        doomed = path.with_name(f"{path.name}{_PART}")
        remove(doomed)
        os.replace(path, doomed)
        sync_folder(path.parent)
    shutil.rmtree(doomed)


def sync(file: IO[Any]) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, if the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    if not path.is_dir():
        sync_path(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            sync_path(Path(folder, name))
        sync_folder(Path(folder))


def sync_path(path: Path) -> None:
    """Flush a closed file to disk; do nothing for a symbolic link."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes writable files only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path` against other processes and threads; the system releases it after a crash.

    Args:
        path: The lock file, created if needed and left in place. If it cannot be created, or the file system has no
            locks, the block runs unlocked.
        wait: Whether to wait for the holder.

    Raises:
        filelock.Timeout: Another process or thread holds the lock and `wait` is False.
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


def require_writable(file: str | None, *, flag: str = "json") -> None:
    """Check that an output file can be written, before anything is computed, without creating or changing it.

    Args:
        file: Path of the file, or None.
        flag: Name of the flag that it came from.

    Raises:
        UserError: The path is a folder, or its folder is missing or read-only.
    """
    if not file:
        return
    path = Path(file)
    if not path.parent.is_dir():
        raise UserError(f"--{flag} {file} cannot be written: its folder does not exist; make it first")
    try:
        if path.exists():
            path.open("ab").close()
        if path.is_file() or not path.exists():  # else a device, which is written directly
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise UserError(f"--{flag} {file} cannot be written: {error.strerror}; choose another") from error
