"""Files of ``torch.save``: mapped into memory, unpickled safely, read one tensor at a time."""

import copy
import enum
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lightning_gpt.config import UserError
from lightning_gpt.parsing import brief


class MappedFile:
    """A file of ``torch.save`` with memory-mapped tensors, whose bytes are read when they are copied.

    Args:
        path: The file.
        trust: Whether the file may run code while it is read.
        stand_ins: Safe substitutes for pickled classes: pairs of a class or function and the full name it replaces.
        files: Number of files that are read in turn and share the budget of mapped bytes.

    Raises:
        UserError: The file is damaged, or holds Python objects and is not trusted.
    """

    # Pages of a memory map that were read count as memory until it is closed (nanoGPT#287).
    _RENEW_AFTER = 64 * 2**20

    def __init__(
        self, path: Path, *, trust: bool, stand_ins: tuple[tuple[Callable[..., Any], str], ...] = (), files: int = 1
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
        _require_stored(self.path, self.path, size=self._version[1])
        try:
            with torch.serialization.safe_globals(list(self._stand_ins)):
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            _require_backed(content, path=self.path)
            return content
        except UserError:
            raise
        except Exception as error:  # damaged bytes can raise anything
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign and self._trust:
                return torch.load(self.path, map_location="cpu", weights_only=False, mmap=True)
            raise (untrusted(self.path, foreign[1]) if foreign else unreadable(self.path, error)) from error


def load_slice(path: Path, *, start: int, length: int) -> Any:
    """Read a part of a file that is itself a file of ``torch.save``, of tensors and primitives only.

    Raises:
        UserError: It is damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            part = io.BytesIO(file.read(length))
        _require_stored(path, part, size=length)
        part.seek(0)
        content = torch.load(part, map_location="cpu", weights_only=True)
        _require_backed(content, path=path)
        return content
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise unreadable(path, error) from error


def _require_stored(path: Path, file: IO[bytes] | Path, *, size: int) -> None:
    """Check that a file of ``torch.save`` holds what it declares: its records are not compressed and do not overlap.

    Raises:
        UserError: Reading it would take more memory than the file has bytes, or it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except Exception as error:  # damaged bytes can raise anything
        raise unreadable(path, error) from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError(f"{path} is not a readable checkpoint: it is compressed, which torch.save never does")
    if sum(record.file_size for record in records) > size:
        raise UserError(f"{path} is not a readable checkpoint: it declares more bytes than it holds")


def _require_backed(content: Any, *, path: Path) -> None:
    """Check that each tensor in a saved object is as large as the bytes it was stored in.

    Raises:
        UserError: A tensor is of another kind, or repeats its bytes, so that copying it could take any memory.
    """
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise UserError(f"{path} is not a readable checkpoint: it holds a tensor without plain values")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{path} is not a readable checkpoint: a tensor is larger than what is stored of it")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value, *value.values()] if isinstance(value, dict) else value


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
    return UserError(f"{path} is not a readable checkpoint: {brief(error)}")


def enum_member(kind: Any, name: Any) -> Any:
    """Return an enum's member, in place of ``getattr``, through which Python 3.11.0 to 3.11.3 pickles members.

    Raises:
        UnpicklingError: `kind` is not an enum, or has no such member.
    """
    if not isinstance(kind, type) or not issubclass(kind, enum.Enum) or name not in kind.__members__:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL builtins.getattr of something else than an enum")
    return kind.__members__[name]
