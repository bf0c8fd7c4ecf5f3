"""Read the sizes of a Parquet file's pages, before Arrow unpacks any of them.

Arrow reads a whole page into memory, and the footer need not tell the truth about it. Each page begins with a header in
Thrift's compact protocol, from which Arrow takes the size of the buffer, so that it can be trusted as an upper limit.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

# Fields of Parquet's PageHeader, and of the headers of both kinds of data pages inside it.
_UNCOMPRESSED, _COMPRESSED, _DATA, _DATA_V2, _NUM_VALUES = 2, 3, 5, 8, 1


def page_sizes(file: BinaryIO, column: Any) -> Iterator[int]:
    """Yield the unpacked size of each page of a column chunk, in bytes.

    Args:
        file: The open file.
        column: The ``pyarrow.parquet.ColumnChunkMetaData``.

    Raises:
        ValueError: A header is damaged.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    file.seek(start)
    values = 0
    while values < column.num_values:
        header = _struct(file)
        unpacked, packed = header.get(_UNCOMPRESSED), header.get(_COMPRESSED)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or packed < 0:
            raise ValueError("a page without a size")
        yield unpacked
        values += sum(header[kind].get(_NUM_VALUES, 0) for kind in (_DATA, _DATA_V2) if kind in header)
        file.seek(packed, 1)


def _struct(file: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """Read a struct of Thrift's compact protocol: integers and structs by field number."""
    if depth > 8:
        raise ValueError("a page header that is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while kind := _byte(file):
        delta, kind = kind >> 4, kind & 15
        number = number + delta if delta else _zigzag(file)
        if kind in (1, 2):  # true, false
            fields[number] = kind == 1
        elif kind == 3:
            fields[number] = _byte(file)
        elif kind in (4, 5, 6):
            fields[number] = _zigzag(file)
        elif kind == 7:  # double
            file.seek(8, 1)
        elif kind == 8:  # text
            file.seek(_varint(file), 1)
        elif kind == 12:
            fields[number] = _struct(file, depth + 1)
        else:
            raise ValueError("a page header that has no such form")
    return fields


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("it ends inside of a page")
    return byte[0]


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while (byte := _byte(file)) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits in a page header")
    return value | byte << shift


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return (value >> 1) ^ -(value & 1)
