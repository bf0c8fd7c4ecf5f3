"""Read documents block by block from plain text, JSON lines and Parquet, also compressed by gzip or Zstandard."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from lightning_gpt.config import UserError
from lightning_gpt.data.text.parquet_pages import page_sizes
from lightning_gpt.invocation import install_line
from lightning_gpt.parsing import parse_json

BLOCK_BYTES = 1 << 20
# Rows are held in memory, and JSON's objects take up to 24 times its bytes. Text files are streamed, and may have any
# size.
MAX_ROW_BYTES = 32 << 20
MAX_PAGE_BYTES = 256 << 20
# Real text shrinks less than 200 times. Small files may shrink more.
_MAX_EXPANSION, _ANY_EXPANSION = 200, 16 << 20
COMPRESSED = frozenset({".gz", ".zst"})
ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
_BATCH_BYTES = 4 << 20


class Block(NamedTuple):
    """Bytes of one document.

    Attributes:
        data: The bytes; they may end inside a character.
        ends: Whether the document ends here.
        where: The file, and the row if it has rows, for messages.
        offset: Offset of the first byte in the document.
        disk: Bytes read so far, of the documents' `size`.
    """

    data: bytes
    ends: bool
    where: str
    offset: int
    disk: int


class Documents(Protocol):
    """A fixed sequence of documents that can be read from any position."""

    @property
    def size(self) -> int | None:
        """Return the total number of bytes to read, or None if unknown."""

    def identity(self) -> list[Any]:
        """Return what identifies these documents and their content, in JSON types."""

    def blocks(self, first: int = 0, offset: int = 0) -> Iterator[Block]:
        """Yield blocks from byte `offset` of document `first` on."""


@dataclass(frozen=True)
class FileDocuments:
    """The documents in files: a text file is one document, and so is every row of JSON lines and Parquet.

    Attributes:
        files: The files, in order.
        field: The field or column that holds a row's text.
    """

    files: tuple[Path, ...]
    field: str = "text"

    @property
    def size(self) -> int:
        """Return the size of the files on disk, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def identity(self) -> list[Any]:
        """Return the path, size and modification time of every file, and the field."""
        stats = [(str(path.resolve()), path.stat()) for path in self.files]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats] + [self.field]

    def blocks(self, first: int = 0, offset: int = 0) -> Iterator[Block]:
        """Yield blocks from byte `offset` of document `first` on.

        Raises:
            UserError: A file is damaged, or a row has no text.
            OSError: A file cannot be read.
        """
        number = before = 0  # documents and bytes in earlier files
        for path in self.files:
            size = path.stat().st_size
            row_reader = _ROW_READERS.get(_bare_suffix(path))
            if row_reader is None:
                if number >= first:
                    yield from _text(path, before, offset if number == first else 0)
                number += 1
            else:
                skip = max(0, first - number)
                for row in row_reader(path, self.field, skip, before):
                    start = offset if number == first else 0
                    if number >= first:
                        yield row._replace(data=row.data[start:], offset=start)
                    number += 1
            before += size


def is_plain_text(path: Path) -> bool:
    """Return whether a file, possibly compressed, is one document instead of rows."""
    return _bare_suffix(path) not in _ROW_READERS


def ending_in_newline(documents: Documents, first: int = 0, offset: int = 0) -> Iterator[Block]:
    """Yield `Documents.blocks`, ending each non-empty document in a newline; `offset` counts added newlines too."""
    last = b""
    for block in documents.blocks(first, max(0, offset - 1)):
        data = block.data
        last = data[-1:] or last
        if block.ends and last not in (b"", b"\n"):
            data += b"\n"
        if offset:  # one byte more was read, to know whether a newline is missing
            data, block, offset = data[1:], block._replace(offset=offset), 0
        if block.ends:
            last = b""
        yield block._replace(data=data)


def _bare_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a file, decompressed; also yield a function that returns how many bytes of the file were read."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        stream: Any = file
        try:
            if suffix == ".gz":
                stream = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif suffix == ".zst":
                stream = stack.enter_context(_decompressed_zst(path, file))
            yield stream, file.tell
        except (OSError, EOFError, zlib.error) as error:
            if getattr(error, "errno", None) is not None:  # a disk error, after which a later run may continue
                raise
            raise UserError(f"{path} is damaged or not a {suffix} file: {error}") from error


def _decompressed_zst(path: Path, file: BinaryIO) -> BinaryIO:
    pyarrow = require("pyarrow", f"{path}: reading Zstandard")
    # Unlike the package zstandard, Arrow reports a truncated file.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), BLOCK_BYTES)


def require(package: str, what: str) -> Any:
    """Import an optional package.

    Args:
        package: Name of the package.
        what: What needs it; the error message begins with this.

    Raises:
        UserError: The package is not installed.
    """
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: {install_line('data')}") from None


def _text(path: Path, before: int, offset: int) -> Iterator[Block]:
    with _opened(path) as (stream, bytes_read):
        if path.suffix.lower() in COMPRESSED:
            for start in range(0, offset, BLOCK_BYTES):
                stream.read(min(BLOCK_BYTES, offset - start))
        else:
            stream.seek(offset)
        data = stream.read(BLOCK_BYTES)
        while True:
            _require_expansion(path, offset + len(data), bytes_read())
            after = stream.read(BLOCK_BYTES) if data else b""
            yield Block(data, not after, str(path), offset, before + bytes_read())
            if not after:
                return
            offset, data = offset + len(data), after


def _require_expansion(path: Path, size: int, packed: int) -> None:
    """Raise a UserError if the bytes unpacked so far are far more than those read for them, as in a "zip bomb"."""
    if size > _ANY_EXPANSION + _MAX_EXPANSION * packed:
        raise UserError(
            f"{path} unpacks to more than {_MAX_EXPANSION} times its size, which no text does; if it is meant so,"
            " unpack it first"
        )


def _json_rows(path: Path, field: str, skip: int, before: int) -> Iterator[Block]:
    with _opened(path) as (stream, bytes_read):
        size = 0
        for number in itertools.count(1):
            line = stream.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            size += len(line)
            _require_expansion(path, size, bytes_read())
            where = f"{path}, line {number}"
            if len(line) > MAX_ROW_BYTES:
                raise _row_too_long(where)
            if line.isspace():
                continue
            data = b"" if skip > 0 else _text_of_row(line, field, where)
            skip -= 1
            yield Block(data, True, where, 0, before + bytes_read())


def _text_of_row(line: bytes, field: str, where: str) -> bytes:
    row = parse_json(line, source=where)
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object with a field {field!r}")
    if not isinstance(row.get(field), str):
        texts = ", ".join(key for key, value in row.items() if isinstance(value, str))
        raise UserError(
            f"{where} has no text in field {field!r} (text fields: {texts or 'none'}); name one by prepare.py --field"
        )
    try:
        return row[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not text: it has an unpaired surrogate escape (character {error.start})") from None


def _parquet_rows(path: Path, field: str, skip: int, before: int) -> Iterator[Block]:
    require("pyarrow", f"{path}: reading Parquet")
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    number = unpacked = 0
    try:
        # pre_buffer would hold a whole row group in memory.
        with parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            index = _check_column(path, file.schema_arrow, file.schema, field)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            for i, group in enumerate(groups):
                if number + group.num_rows <= skip:
                    yield from itertools.repeat(Block(b"", True, str(path), 0, before), group.num_rows)
                    number += group.num_rows
                    continue
                rows = _rows_at_once(path, group.column(index), group.num_rows)
                for batch in file.iter_batches(rows, row_groups=[i], columns=[field]):
                    for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        number += 1
                        where = f"{path}, row {number}"
                        if value is None:
                            raise UserError(f"{where} has no text in column {field!r}")
                        if len(value) > MAX_ROW_BYTES:
                            raise _row_too_long(where)
                        unpacked += len(value)
                        _require_expansion(path, unpacked, size)
                        disk = before + size * number // max(1, file.metadata.num_rows)
                        yield Block(value, True, where, 0, disk)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path} is damaged or not a Parquet file: {error}") from error


def _rows_at_once(path: Path, column: Any, num_rows: int) -> int:
    """Return how many rows of a column chunk may be in memory at once. A row is at most as large as a page."""
    with path.open("rb") as file:
        sizes = list(page_sizes(file, column))
    largest = max(sizes, default=0)
    if largest > MAX_PAGE_BYTES:
        raise UserError(
            f"{path} has a page of {largest >> 20:,} MiB, and at most {MAX_PAGE_BYTES >> 20} MiB are read; write it"
            " again with smaller pages, and long documents as text files"
        )
    return max(1, min(1024, _BATCH_BYTES * num_rows // max(1, sum(sizes)), MAX_PAGE_BYTES // max(1, largest)))


def _row_too_long(where: str) -> UserError:
    return UserError(f"{where} is longer than {MAX_ROW_BYTES >> 20} MiB; give long documents as text files")


def _check_column(path: Path, schema: Any, columns: Any, field: str) -> int:
    """Return the index of a text column among the leaves of the file's schema."""
    from pyarrow import types

    texts = [c.name for c in schema if any(fits(c.type) for fits in (types.is_string, types.is_large_string))]
    if field not in texts:
        raise UserError(
            f"{path} has no text column {field!r} (text columns: {', '.join(texts) or 'none'}); name one by "
            "prepare.py --field"
        )
    return next(i for i in range(len(columns.names)) if columns.column(i).path == field)


_ROW_READERS: dict[str, Callable[[Path, str, int, int], Iterator[Block]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
}
