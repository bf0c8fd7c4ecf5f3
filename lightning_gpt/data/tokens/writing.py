"""Write a token folder incrementally: it appears complete or not at all, and an interrupted job can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from filelock import Timeout

from lightning_gpt.atomic import atomic_file, locked, swap_in, sync, sync_folder
from lightning_gpt.config import UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
_FILE_NAMES = frozenset({"train.bin", "val.bin", "meta.json"})


class TokenWriter:
    """Write `train.bin` and `val.bin` in a hidden work folder, and move the finished folder to its place.

    A journal in the work folder records how many bytes of each file are safely on disk, and the state of the job at
    that point. A later writer of the same job continues from there; a writer of another job starts over. As a context
    manager, the writer deletes the work folder after a `UserError`, because the input must change first, and keeps it
    after any other error.

    Args:
        folder: The folder to create; an existing one must be empty or hold only token files, which are replaced.
        job: Description of the job, in JSON types; a writer continues earlier work only if its job is equal.
        keep: False to delete the work folder after any error.

    Attributes:
        state: The last committed state; empty at first.
        resumed: Whether unfinished work of the same job was found, which this writer continues.
        finished: Whether the same job was found complete; then only `discard` remains to be called.
        discarded: Whether work of another job was found and deleted.

    Raises:
        UserError: The folder holds other files, or another process is writing it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, job: dict[str, Any], keep: bool = True) -> None:
        self._keep = keep
        self.folder = folder.resolve()
        self._work = self.folder.parent / f".{self.folder.name}.partial"
        self._new, self._old, self._journal = self._work / "new", self._work / "old", self._work / "journal.json"
        self._job = json.loads(json.dumps(job))
        self._files: dict[Split, BinaryIO] = {}
        self.state: dict[str, Any] = {}
        require_replaceable(folder)
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(locked(self._work / "lock", wait=False))
        except Timeout:
            raise UserError(f"{self.folder} is being written by another process; wait for it, or stop it") from None
        try:
            if (self._new / "meta.json").is_file():  # complete: an earlier writer was stopped in publish
                self._replace()
            journal = self._read_journal()
            same_job = journal.get("job") == self._job
            self.finished = same_job and not self._new.exists()
            self.resumed = same_job and not self.finished
            self.discarded = bool(journal) and not same_job
            if not same_job:
                self._journal.unlink(missing_ok=True)
                for path in (self._new, self._old):
                    shutil.rmtree(path, ignore_errors=True)
            if not self.finished:
                self._open(journal if same_job else {})
        except BaseException:
            self.close()
            raise

    def _open(self, journal: dict[str, Any]) -> None:
        self._new.mkdir(exist_ok=True)
        self.state = journal.get("state", {})
        for split in SPLITS:
            file = self._files[split] = open(self._new / f"{split}.bin", "ab")
            file.truncate(journal["sizes"][split] if journal else 0)
            file.seek(0, os.SEEK_END)
        sync_folder(self._new)

    def _read_journal(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._journal.read_text(encoding="ascii"))
        return {}

    def append(self, split: Split, tokens: bytes) -> None:
        """Append little-endian token ids to a split; the next `commit` makes them durable.

        Raises:
            OSError: The file cannot be written.
        """
        self._files[split].write(tokens)

    def size(self, split: Split) -> int:
        """Return the bytes written to a split so far."""
        return self._files[split].tell()

    def commit(self, state: dict[str, Any]) -> None:
        """Flush everything appended so far, then record it and `state` in the journal.

        Args:
            state: State of the job, in JSON types; a later writer finds it in `state`.

        Raises:
            OSError: The disk failed; the previous commit stays valid.
        """
        for file in self._files.values():
            sync(file)
        sizes = {split: self.size(split) for split in SPLITS}
        with atomic_file(self._journal, mode="w") as journal:
            json.dump({"job": self._job, "sizes": sizes, "state": state}, journal)
        self.state = state

    def publish(self, meta: dict[str, Any]) -> None:
        """Add `meta.json`, move the finished folder to its place and delete the work folder.

        Args:
            meta: The content of `meta.json`.

        Raises:
            UserError: Other files have appeared in the folder.
            OSError: The disk failed.
        """
        for file in self._files.values():
            sync(file)
            file.close()
        meta_file = self._work / "meta.json"  # outside `new`, whose meta.json means that the folder is complete
        meta_file.write_text(json.dumps(meta, indent=2) + "\n", encoding="ascii", newline="\n")
        swap_in(meta_file, self._new / "meta.json")
        self._replace()
        self.discard()

    def _replace(self) -> None:
        require_replaceable(self.folder)
        swap_in(self._new, self.folder, old=self._old)

    def discard(self) -> None:
        """Delete the work folder."""
        self.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Close all files and release the lock; the work folder stays."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk; uncommitted bytes are discarded anyway
                file.close()
        self._lock.close()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, UserError) or not self._keep:
            self.discard()
        else:
            self.close()


def require_replaceable(folder: Path) -> None:
    """Check that a folder is missing, empty or holds only token files, so that it may be replaced.

    Raises:
        UserError: The path is a file, or the folder holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder")
    if folder.exists() and not {path.name for path in folder.iterdir()} <= _FILE_NAMES:
        raise UserError(f"{folder} holds files other than token files; name a new folder")
