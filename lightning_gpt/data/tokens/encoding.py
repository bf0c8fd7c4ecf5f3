"""Encode text on several threads: cut it where the tokens do not change, encode the pieces, return them in order."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lightning_gpt.data.tokens.writing import SPLITS, Split
from lightning_gpt.tokenizers import Tokenizer

# Bytes that a thread encodes at a time. The tokens do not depend on it.
UNIT_BYTES = 1 << 19
# Maximum length of text to search for a safe place to cut. Longer text is cut anyway, which may add a few tokens.
LIMIT_BYTES = 4 << 20
_AHEAD_BYTES = 1 << 12
_IN_FLIGHT_BYTES = 16 << 20
_MAX_PIECES = 1 << 12
_WORD = re.compile(rb"(?<=[!-~]) (?=[A-Za-z])")


class Span(NamedTuple):
    """Bytes of one text as they are read.

    Attributes:
        data: The bytes; they may end inside a character.
        split: The split that the text belongs to.
        ends_text: Whether the text ends here; no token spans two texts.
        ends_document: Whether the document ends here.
        where: The file, and the row if it has rows, for error messages.
        offset: Offset of the first byte in that place.
        disk: Bytes read so far, of the documents' `size`.
    """

    data: bytes
    split: Split
    ends_text: bool
    ends_document: bool
    where: str
    offset: int
    disk: int


class Position(NamedTuple):
    """A position in the corpus: number of complete documents, and bytes of the next one."""

    document: int
    offset: int


@dataclass
class Piece:
    """Bytes of one text that are encoded independently.

    Attributes:
        data: The bytes.
        split: The split that the text belongs to.
        ends_text: Whether the text ends here.
        rough: Whether the cut at the end may have changed the tokens.
        where: The file, and the row if it has rows, for error messages.
        offset: Offset of the first byte in that place.
        after: Position of the end.
        disk: Bytes read so far, of the documents' `size`.
    """

    data: bytes
    split: Split
    ends_text: bool
    rough: bool
    where: str
    offset: int
    after: Position
    disk: int


@dataclass
class Unit:
    """The work of one thread at a time: a piece of a long text, or many short texts."""

    pieces: list[Piece] = field(default_factory=list)
    n_bytes: int = 0


def pieces(spans: Iterable[Span], *, tokenizer: Tokenizer, start: Position) -> Iterator[Piece]:
    """Cut texts into pieces whose concatenated tokens equal the tokens of the whole texts.

    The pieces depend only on the text from `start` on, so a resumed job gets the same remaining pieces.

    Args:
        spans: The text, in order.
        tokenizer: The tokenizer that will encode it, which decides where it may be cut.
        start: Position of the first span.
    """
    document, document_start = start.document, -start.offset  # in bytes since `start`, like `taken`
    taken = read = 0  # bytes in pieces, bytes in spans
    buffer = bytearray()
    ends: deque[int] = deque()  # ends of documents, in bytes since `start`
    look = UNIT_BYTES + _AHEAD_BYTES  # bytes to search for a cut
    where, offset = "", 0
    for span in spans:
        if not buffer:
            where, offset = span.where, span.offset
        buffer += span.data
        read += len(span.data)
        if span.ends_document:
            ends.append(read)
        while len(buffer) >= look or span.ends_text:
            whole = span.ends_text and len(buffer) <= look
            size, rough = _next_cut(buffer, look, tokenizer), False
            if size is None and whole:
                size = len(buffer)
            elif size is None and look >= LIMIT_BYTES:
                size, rough = _rough_cut(buffer), True
            elif size is None:
                look = min(2 * look, LIMIT_BYTES)
                continue
            taken += size
            while ends and ends[0] <= taken:
                document, document_start = document + 1, ends.popleft()
            last = span.ends_text and size == len(buffer)
            after = Position(document, taken - document_start)
            yield Piece(bytes(buffer[:size]), span.split, last, rough, where, offset, after, span.disk)
            del buffer[:size]
            offset += size
            look = UNIT_BYTES + _AHEAD_BYTES
            if last:
                break


def _next_cut(buffer: bytearray, look: int, tokenizer: Tokenizer) -> int | None:
    if len(buffer) <= UNIT_BYTES:
        return None
    # Search a part of fixed length, so that the result does not depend on block boundaries.
    return tokenizer.cut(bytes(buffer[:look]), UNIT_BYTES)


def _rough_cut(buffer: bytearray) -> int:
    """Cut before the last single space between words, which rarely changes the tokens; else between characters."""
    words = [found.start() for found in _WORD.finditer(buffer, LIMIT_BYTES // 2, LIMIT_BYTES)]
    if words:
        return words[-1]
    size = LIMIT_BYTES - 1
    while size > LIMIT_BYTES - 4 and buffer[size] & 0xC0 == 0x80:
        size -= 1
    return size


def units(cut: Iterable[Piece]) -> Iterator[Unit]:
    """Group pieces, in order, into units that are large enough for a thread."""
    unit = Unit()
    for piece in cut:
        unit.pieces.append(piece)
        unit.n_bytes += len(piece.data)
        if unit.n_bytes >= UNIT_BYTES or len(unit.pieces) >= _MAX_PIECES:
            yield unit
            unit = Unit()
    if unit.pieces:
        yield unit


@dataclass(frozen=True)
class Encoder:
    """Encode units.

    Attributes:
        tokenizer: The tokenizer.
        dtype: "uint16" or "uint32".
        end_of_text: Token to add after each text, or None.
    """

    tokenizer: Tokenizer
    dtype: str
    end_of_text: int | None = None

    def __call__(self, unit: Unit) -> dict[Split, bytes]:
        """Return the tokens of a unit for each split, as the bytes of its file.

        Raises:
            UserError: The tokenizer cannot encode the text.
        """
        dtype = np.dtype(self.dtype).newbyteorder("<")
        end = b"" if self.end_of_text is None else np.array([self.end_of_text], dtype).tobytes()
        parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
        for piece in unit.pieces:
            tokens = self.tokenizer.encode_bytes(piece.data, source=piece.where, offset=piece.offset)
            parts[piece.split] += [tokens.astype(dtype).tobytes(), end if piece.ends_text else b""]
        return {split: b"".join(part) for split, part in parts.items()}


def encode_in_order(
    todo: Iterable[Unit], encode: Callable[[Unit], dict[Split, bytes]], *, workers: int
) -> Iterator[tuple[Unit, dict[Split, bytes]]]:
    """Encode units on several threads and yield each with its tokens, in order.

    Threads suffice, because tokenizers release the GIL. Only enough units to keep every thread busy are taken from
    `todo`, so memory does not depend on the length of the text.

    Args:
        todo: The units; read by the calling thread.
        encode: Function that encodes a unit, such as an `Encoder`.
        workers: Number of threads.

    Raises:
        UserError: The tokenizer cannot encode the text.
    """
    waiting: deque[tuple[Unit, Future[dict[Split, bytes]]]] = deque()
    in_flight, max_in_flight = 0, max(_IN_FLIGHT_BYTES, 2 * workers * UNIT_BYTES)
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for unit in todo:
                waiting.append((unit, pool.submit(encode, unit)))
                in_flight += unit.n_bytes
                while len(waiting) > 2 * workers or in_flight > max_in_flight:
                    done, future = waiting.popleft()
                    in_flight -= done.n_bytes
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
