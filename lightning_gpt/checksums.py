"""Checksums of checkpoints: sha256, written with a checkpoint and compared by `verify_checksums`.

A folder holds ``SHA256SUMS``, which lists its other files in the format of ``sha256sum --check``. It is written last,
so it also marks the folder as complete. A file of ``torch.save`` holds its checksum at its end, in the comment of the
zip archive, which torch and other readers of zip files skip. In both forms one rename publishes the content together
with its checksum, and hard links share both, so a crash never leaves a checksum that disagrees with its file; a file
beside the checkpoint could.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lightning_gpt.atomic import sync
from lightning_gpt.config import UserError

MANIFEST = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")
_MAX_MANIFEST_BYTES = 2**24
_MAX_NAME = 255  # characters; longer names are an OSError
_BLOCK_BYTES = 2**20
_THREADS = 4

_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\3\4", b"PK\5\6", 22
_LABEL = b"sha256:"
_COMMENT_BYTES = len(_LABEL) + 64


class IncompleteError(UserError):
    """A checkpoint folder lacks files, such as after an interrupted copy."""


@dataclass(frozen=True)
class Verified:
    """What was compared with its checksums.

    Attributes:
        files: Number of files.
        size: Their bytes.
    """

    files: int
    size: int


class HashedZip:
    """A file to ``torch.save`` into, which appends the checksum in `finish`.

    Tensors are written from where they are, without a copy, and hashed meanwhile in another thread.

    Args:
        file: The open file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""  # the last bytes, which become the archive's end record
        self._pool = ThreadPoolExecutor(1)
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; torch calls this in the order of the file."""
        view = memoryview(data).cast("B")
        if len(view) >= _ZIP_END_BYTES:
            self._put(memoryview(self._held))
            self._put(view[:-_ZIP_END_BYTES])
            self._held = bytes(view[-_ZIP_END_BYTES:])
        else:
            tail = self._held + bytes(view)
            self._put(memoryview(tail)[:-_ZIP_END_BYTES])
            self._held = tail[-_ZIP_END_BYTES:]
        return len(view)

    def _put(self, view: memoryview) -> None:
        hashed = self._pool.submit(self._digest.update, view) if len(view) > _BLOCK_BYTES else None
        try:
            self._file.write(view)
        except OSError as error:  # torch turns it into a RuntimeError about positions
            self.error = self.error or error
            raise
        finally:
            if hashed is None:
                self._digest.update(view)
            else:
                hashed.result()

    def flush(self) -> None:
        """Do nothing; the owner of the file flushes it."""

    def finish(self) -> None:
        """Write the end record with the checksum of all bytes before it, itself included up to its comment."""
        self._pool.shutdown()
        assert len(self._held) == _ZIP_END_BYTES and self._held.startswith(_ZIP_END), "torch.save writes zip archives"
        self._put(memoryview(self._held[:-2] + _COMMENT_BYTES.to_bytes(2, "little")))
        self._file.write(_LABEL + self._digest.hexdigest().encode())


def file_digest(path: Path, *, size: int | None = None) -> str:
    """Return the sha256 of a file, or of its first `size` bytes, in hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    left = path.stat().st_size if size is None else size
    with path.open("rb", buffering=0) as file:
        while left and (count := file.readinto(buffer[: min(left, _BLOCK_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def folder_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files by name, several at a time.

    Args:
        folder: The folder.
        names: Paths of the files relative to it.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter's lock
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name), names), strict=True))


def files_in(folder: Path) -> list[str]:
    """Return the files of a folder and its subfolders that a manifest lists, as sorted relative paths."""
    found = (Path(at, name).relative_to(folder).as_posix() for at, _, names in os.walk(folder) for name in names)
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files, and flush them to disk; call this last.

    Args:
        folder: The folder, which is not published yet.
        digests: sha256 by relative path.

    Raises:
        OSError: The file cannot be written.
    """
    with (folder / MANIFEST).open("x", encoding="utf-8", newline="\n") as file:
        file.write(_manifest(digests))
        sync(file)


def _manifest(digests: Mapping[str, str]) -> str:
    """Return the content of a manifest; its last line, a comment for other tools, shows that it was not cut off."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())) + f"# {len(digests)} files\n"


def read_manifest(folder: Path) -> dict[str, str] | None:
    """Return the checksums of a folder's files by relative path; None if it has none.

    Raises:
        UserError: The list is damaged.
        IncompleteError: A listed file is missing.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; use another checkpoint") from error
    digests = {name: digest for digest, name in _LINE.findall(text)}
    if not digests or text != _manifest(digests) or any(len(name) > _MAX_NAME for name in digests):
        raise UserError(f"{path} is damaged: it is not a list of checksums; use another checkpoint")
    for name in digests:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{path} is damaged: it lists {name}, which is outside of the folder; use another checkpoint"
            )
        if not (folder / name).is_file():
            raise IncompleteError(f"{folder} is incomplete: {name} is missing; copy the files of all ranks")
    return digests


def require_manifest(folder: Path, header: Mapping[str, Any]) -> None:
    """Check that a folder has its checksums, unless its header shows that an older version wrote it without them.

    Raises:
        UserError: The list is damaged.
        IncompleteError: The list or a listed file is missing.
    """
    if read_manifest(folder) is None and header.get("checksums"):
        raise IncompleteError(f"{folder} is incomplete: {MANIFEST} is missing; copy the whole folder again")


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint holds all of its files, as far as a manifest tells; do not read them."""
    try:
        read_manifest(path)
    except IncompleteError:
        return False
    except UserError:  # damaged, which is for `verify_checksums` to say
        return True
    return path.exists()


def verify_checksums(path: Path) -> Verified | None:
    """Compare a checkpoint with its checksums.

    Args:
        path: A file of ``torch.save``, or a folder.

    Returns:
        What was compared; None if there are no checksums, as in checkpoints of older versions and other programs.

    Raises:
        UserError: A file does not have its checksum, or the checksums are damaged.
        IncompleteError: A file is missing.
    """
    try:
        return _verify_folder(path) if path.is_dir() else _verify_file(path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _verify_folder(folder: Path) -> Verified | None:
    expected = read_manifest(folder)
    if expected is None:
        return None
    for name, digest in folder_digests(folder, expected).items():
        if digest != expected[name]:
            raise _damaged(folder / name)
    return Verified(len(expected), sum((folder / name).stat().st_size for name in expected))


def _verify_file(path: Path) -> Verified | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
        file.seek(max(0, size - _COMMENT_BYTES))
        end = file.read()
    if re.fullmatch(_LABEL + rb"[0-9a-f]{64}", end):
        if file_digest(path, size=size - _COMMENT_BYTES).encode() != end.removeprefix(_LABEL):
            raise _damaged(path)
        return Verified(1, size)
    # A zip archive without a comment ends with its end record and a zero length. All else was changed or cut off.
    last = end[-_ZIP_END_BYTES:]
    if start == _ZIP_START and not (last.startswith(_ZIP_END) and last.endswith(b"\0\0")):
        raise _damaged(path)
    return None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: its content does not match its sha256 checksum; use another checkpoint")
