"""Files of ``torch.save``: mapped into memory, unpickled safely, read one tensor at a time."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.config import UserError


class MappedFile:
    """A file of ``torch.save`` with memory-mapped tensors, whose bytes are read when they are copied.

    Args:
        path: The file.
        trust: Whether the file may run code while it is read.
        stand_ins: Safe substitutes for pickled classes: pairs of a class and the full name of the class it replaces.
        files: Number of files that are read in turn and share the budget of mapped bytes.

    Raises:
        UserError: The file is damaged, or holds Python objects and is not trusted.
    """

    # Pages of a memory map that were read count as memory until it is closed (nanoGPT#287).
    _RENEW_AFTER = 64 * 2**20

    def __init__(
        self, path: Path, *, trust: bool, stand_ins: tuple[tuple[type, str], ...] = (), files: int = 1
    ) -> None:
        self.path = path
        self._trust = trust
        self._stand_ins = stand_ins
        self._renew_after = self._RENEW_AFTER // files
        self._bytes_read = 0
        self._version = self._stat()
        self._content: Any = self._load()

    @property
    def content(self) -> Any:
        """The saved object. Do not keep its tensors: they would keep the whole file mapped."""
        if self._content is None:
            if self._stat() != self._version:
                raise UserError(f"{self.path} was replaced while it was read; try again")
            self._content, self._bytes_read = self._load(), 0
        return self._content

    def read(self, get: Callable[[Any], Tensor]) -> Tensor:
        """Return a copy of the tensor that `get` picks from the content."""
        tensor = get(self.content).detach().clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read > self._renew_after:
            self._content = None
        return tensor

    def _stat(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise unreadable(self.path, error) from error
        return stat.st_mtime_ns, stat.st_size

    def _load(self) -> Any:
        """Unpickle the file: only tensors and primitives, or any object if the file is trusted."""
        try:
            with torch.serialization.safe_globals(list(self._stand_ins)):
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged bytes can raise anything
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign and self._trust:
                return torch.load(self.path, map_location="cpu", weights_only=False, mmap=True)
            raise (untrusted(self.path, foreign[1]) if foreign else unreadable(self.path, error)) from error


def read_header(path: Path, *, trust: bool) -> Any:
    """Read a small file of ``torch.save`` completely; the result does not share the file's memory.

    Raises:
        UserError: As for ``MappedFile``.
    """
    return copy.deepcopy(MappedFile(path, trust=trust).content)


def untrusted(path: Path, name: str) -> UserError:
    """Return the error for a file that would run code, naming the first class found in it."""
    return UserError(
        f"{path} holds Python objects ({name}), which can run code when they are loaded; give --trust_checkpoint if"
        " you trust who made it"
    )


def unreadable(path: Path, error: BaseException) -> UserError:
    """Return the error for a damaged file or one of another kind."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is not a readable checkpoint: {reason}")
