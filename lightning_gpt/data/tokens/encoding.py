"""Text to tokens on many threads: cut where the tokens stay those of the whole, encoded at once, handed on in order."""

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

# Text that a thread takes at a time. The tokens do not depend on it.
UNIT_BYTES = 1 << 19
# Where so much text has no place to cut it, it is cut all the same, and may have some tokens more.
LIMIT_BYTES = 4 << 20
_AHEAD_BYTES = 1 << 12
_IN_FLIGHT_BYTES = 16 << 20
_MAX_PIECES = 1 << 12
_WORD = re.compile(rb"(?<=[!-~]) (?=[A-Za-z])")


class Span(NamedTuple):
    """A part of one text, as it is read.

    Attributes:
        data: The bytes; they may end inside a character.
        split: Which split the text belongs to.
        ends_text: Whether they are the last of their text: tokens never reach over the end of a text.
        ends_document: Whether they are the last of their document.
        where: What to call the place in an error message.
        offset: Place of the first byte there.
        disk: How much of the documents' `size` has been read up to here.
    """

    data: bytes
    split: Split
    ends_text: bool
    ends_document: bool
    where: str
    offset: int
    disk: int


class Position(NamedTuple):
    """A place in the text: so many documents, and so many bytes of the next."""

    document: int
    offset: int


@dataclass
class Piece:
    """A part of one text, with tokens of its own.

    Attributes:
        data: The bytes.
        split: Which split the text belongs to.
        ends_text: Whether they are the last of their text.
        rough: Whether the cut at their end may have changed the tokens.
        where: What to call the place in an error message.
        offset: Place of the first byte there.
        after: The position of their end.
        disk: How much of the documents' `size` had to be read for them.
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
    """What a thread takes at a time: one piece of a long text, or many short texts."""

    pieces: list[Piece] = field(default_factory=list)
    n_bytes: int = 0


def pieces(spans: Iterable[Span], *, tokenizer: Tokenizer, start: Position) -> Iterator[Piece]:
    """Cut texts into pieces whose tokens, one after the other, are those of the whole.

    The pieces depend on the text from `start` on and on nothing else, so that who goes on after any of them gets the
    same further ones.

    Args:
        spans: The text, in order.
        tokenizer: What is going to encode it; knows where it may be cut.
        start: Where the first span begins.
    """
    document, document_start = start.document, -start.offset  # the latter on the scale of `taken`
    taken = read = 0  # bytes in pieces, and bytes of spans
    buffer = bytearray()
    ends: deque[int] = deque()
    look = UNIT_BYTES + _AHEAD_BYTES
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
    # Looked for in a part of fixed length: how the text came in blocks must make no difference.
    return tokenizer.cut(bytes(buffer[:look]), UNIT_BYTES)


def _rough_cut(buffer: bytearray) -> int:
    """Before the last word after a single space, where most tokenizers keep the tokens; else between two characters."""
    words = [found.start() for found in _WORD.finditer(buffer, LIMIT_BYTES // 2, LIMIT_BYTES)]
    if words:
        return words[-1]
    size = LIMIT_BYTES - 1
    while size > LIMIT_BYTES - 4 and buffer[size] & 0xC0 == 0x80:
        size -= 1
    return size


def units(cut: Iterable[Piece]) -> Iterator[Unit]:
    """Put pieces together, in order, until there is something to do for a thread."""
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
    """Encodes units.

    Attributes:
        tokenizer: What does it.
        dtype: "uint16" or "uint32".
        end_of_text: The token after each text; None for none.
    """

    tokenizer: Tokenizer
    dtype: str
    end_of_text: int | None = None

    def __call__(self, unit: Unit) -> dict[Split, bytes]:
        """The tokens of a unit as they lie in the files.

        Raises:
            UserError: The text does not suit the tokenizer.
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
    """Encode units on several threads, and hand on each with its tokens in the order of the text.

    Threads are enough, as tokenizers let go of Python's lock while they work. Only so much text is taken from `todo` at
    a time that every thread has some, so the memory does not depend on the length of the text.

    Args:
        todo: The units; read by the calling thread.
        encode: What encodes one, such as an `Encoder`.
        workers: How many threads encode.

    Raises:
        UserError: The text does not suit the tokenizer.
    """
    waiting: deque[tuple[Unit, Future[dict[Split, bytes]]]] = deque()
    in_flight, most = 0, max(_IN_FLIGHT_BYTES, 2 * workers * UNIT_BYTES)
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for unit in todo:
                waiting.append((unit, pool.submit(encode, unit)))
                in_flight += unit.n_bytes
                while len(waiting) > 2 * workers or in_flight > most:
                    done, future = waiting.popleft()
                    in_flight -= done.n_bytes
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
