"""A folder of tokens, written bit by bit: whole or not there at all, and able to go on after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from lightning_gpt.config import UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
_FILE_NAMES = frozenset({"train.bin", "val.bin", "meta.json"})


class TokenWriter:
    """Writes `train.bin` and `val.bin` into a hidden folder beside the wanted one, which takes its place at the end.

    The hidden folder keeps a journal: how much of the files is known to be on the disk, and where in the text that is.
    A writer of the same job goes on from there; one of another job begins anew. As a context manager it removes the
    hidden folder when it ends by a `UserError`, for then the input has to change, and keeps it at any other end.

    Args:
        folder: Where to; it may exist if it is empty or holds token files only, which are then replaced.
        job: What is written, in JSON's types: the work of another writer goes on only if this is equal.
        keep: False to remove the hidden folder at any end.

    Attributes:
        state: What was last committed; empty at the beginning.
        resumed: Whether work of the same job was found, and goes on.
        finished: Whether the same job was found to be done; nothing is left to do but `discard`.
        discarded: Whether work of another job was found, and removed.

    Raises:
        UserError: The folder holds other files, or somebody else is writing it.
        OSError: It cannot be written.
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
        self._lock = open(self._work / "lock", "a")
        try:
            self._take_lock()
            if (self._new / "meta.json").is_file():  # whole: it was stopped while it took its place
                self._replace()
            journal = self._read_journal()
            mine = journal.get("job") == self._job
            self.finished = mine and not self._new.exists()
            self.resumed = mine and not self.finished
            self.discarded = bool(journal) and not mine
            if not mine:
                self._journal.unlink(missing_ok=True)
                for path in (self._new, self._old):
                    shutil.rmtree(path, ignore_errors=True)
            if not self.finished:
                self._open(journal if mine else {})
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

    def _take_lock(self) -> None:
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is being written by another process; wait for it, or stop it") from None
        except (ImportError, OSError):  # Windows, and some network file systems
            pass

    def _read_journal(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._journal.read_text(encoding="ascii"))
        return {}

    def append(self, split: Split, tokens: bytes) -> None:
        """Add little-endian token ids to a split; they count once they are committed.

        Raises:
            OSError: They cannot be written.
        """
        self._files[split].write(tokens)

    def size(self, split: Split) -> int:
        """What a split has got, in bytes."""
        return self._files[split].tell()

    def commit(self, state: dict[str, Any]) -> None:
        """Note, safely, that all that was added is right, and the state to go on from.

        Args:
            state: In JSON's types; `state` of a later writer.

        Raises:
            OSError: It cannot be written; what was committed before still counts.
        """
        for file in self._files.values():
            _to_disk(file)
        sizes = {split: self.size(split) for split in SPLITS}
        journal = self._journal.with_suffix(".new")
        with open(journal, "w", encoding="ascii") as file:
            json.dump({"job": self._job, "sizes": sizes, "state": state}, file)
            _to_disk(file)
        os.replace(journal, self._journal)
        self.state = state

    def publish(self, meta: dict[str, Any]) -> None:
        """Put the finished folder into its place.

        Args:
            meta: The content of `meta.json`.

        Raises:
            UserError: Meanwhile the folder got other files.
            OSError: It cannot be written.
        """
        for opened in self._files.values():
            _to_disk(opened)
            opened.close()
        with open(self._work / "meta.json", "w", encoding="ascii") as file:
            file.write(json.dumps(meta, indent=2) + "\n")
            _to_disk(file)
        os.replace(self._work / "meta.json", self._new / "meta.json")
        self._replace()
        self.discard()

    def _replace(self) -> None:
        require_replaceable(self.folder)
        if self.folder.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            os.replace(self.folder, self._old)
        os.replace(self._new, self.folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the hidden folder and all that lies in it."""
        self.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Leave the work as it is."""
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):  # a full disk: what was not committed does not count
                file.close()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, UserError) or not self._keep:
            self.discard()
        else:
            self.close()


def require_replaceable(folder: Path) -> None:
    """Check that nothing but token files would be replaced.

    Raises:
        UserError: The folder holds other files, or is none.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder")
    if folder.exists() and not {path.name for path in folder.iterdir()} <= _FILE_NAMES:
        raise UserError(f"{folder} holds files other than token files; name a new folder")


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
