"""Split text into training and validation: by the tail of the text, or at random by document."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lightning_gpt.data.text.documents import Block
from lightning_gpt.data.tokens.encoding import Position, Span
from lightning_gpt.data.tokens.writing import Split

_MARK_BYTES = 16 << 20
_LAST_CODE_POINT = 0x10FFFF

Reader = Callable[[int, int], Iterator[Block]]  # (first document, byte offset in it)


@dataclass(frozen=True)
class Survey:
    """Facts about a whole text, found by reading it once.

    Attributes:
        n_bytes: Length of the text.
        boundary: Byte offset where the validation tail starts; between two characters if the text is UTF-8.
        alphabet: The distinct characters, sorted; empty if the text is not UTF-8 or it was not requested.
    """

    n_bytes: int
    boundary: int
    alphabet: str


def survey(
    read: Reader,
    *,
    val_fraction: float,
    alphabet: bool,
    progress: Callable[[int], object],
    not_utf8: Callable[[Block, bytes], object],
) -> Survey:
    """Read a text once to find its length, its alphabet and where the validation tail starts.

    The tail starts at character int((1 - val_fraction) * number of characters), as in nanoGPT.

    Args:
        read: Reads the text.
        val_fraction: Share of the characters for validation.
        alphabet: Whether to collect the distinct characters.
        progress: Called with the number of bytes read so far, of the documents' `size`.
        not_utf8: Called with the first block that is not UTF-8 and its first invalid bytes; may raise.
    """
    decoder, valid = codecs.getincrementaldecoder("utf-8")(), True
    seen = np.zeros(_LAST_CODE_POINT + 1, dtype=bool)
    n_bytes = n_chars = document = 0
    marks: list[tuple[int, int, Position]] = []  # (characters before, bytes before, position)
    for block in read(0, 0):
        if not marks or n_bytes - marks[-1][1] >= _MARK_BYTES:
            marks.append((n_chars, n_bytes, Position(document, block.offset)))
        if valid:
            try:
                text = decoder.decode(block.data, final=block.ends)
                if alphabet:
                    _collect(text, seen)
            except UnicodeDecodeError as error:
                not_utf8(block, error.object[error.start : error.start + 4])
                valid = False
        n_chars += _n_characters(block.data)
        n_bytes += len(block.data)
        document += block.ends
        progress(block.disk)
    if valid:
        boundary = _byte_of_character(read, marks, int((1 - val_fraction) * n_chars), n_bytes)
    else:
        boundary = int((1 - val_fraction) * n_bytes)
    return Survey(n_bytes, boundary, "".join(map(chr, np.flatnonzero(seen))) if valid else "")


def by_tail(read: Reader, *, found: Survey, start: Position, done: int) -> Iterator[Span]:
    """Yield all documents as one text whose tail is for validation.

    Args:
        read: Reads the text.
        found: Survey of the text.
        start: Position to start from.
        done: Number of bytes before `start`.
    """
    at = done
    for block in read(*start):
        head = max(0, min(found.boundary - at, len(block.data)))
        rest = block
        if head:
            at += head
            ends = block.ends and head == len(block.data)
            yield Span(block.data[:head], "train", at == found.boundary, ends, block.where, block.offset, block.disk)
            if head == len(block.data):
                continue
            rest = block._replace(data=block.data[head:], offset=block.offset + head)
        at += len(rest.data)
        ends_text = bool(rest.data) and at == found.n_bytes
        split: Split = "val" if at > found.boundary else "train"
        yield Span(rest.data, split, ends_text, rest.ends, rest.where, rest.offset, rest.disk)


def by_document(read: Reader, *, val_fraction: float, seed: int, start: Position) -> Iterator[Span]:
    """Yield each document as a text of its own; seed and document number determine its split.

    Args:
        read: Reads the text.
        val_fraction: Probability that a document is for validation.
        seed: Seed of the draw.
        start: Position to start from.
    """
    document = start.document
    for block in read(*start):
        split: Split = "val" if _draw(seed, document) < val_fraction else "train"
        yield Span(block.data, split, block.ends, block.ends, block.where, block.offset, block.disk)
        document += block.ends


def _draw(seed: int, document: int) -> float:
    digest = hashlib.blake2b(f"{seed}\0{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _collect(text: str, seen: np.ndarray) -> None:
    if text.isascii():
        seen[:128] |= np.bincount(np.frombuffer(text.encode("ascii"), np.uint8), minlength=128).astype(bool)
    else:
        seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True


def _starts(data: bytes) -> np.ndarray:
    """Return which bytes start a UTF-8 character, shape (n_bytes,), bool."""
    return np.frombuffer(data, np.uint8) & 0xC0 != 0x80


def _n_characters(data: bytes) -> int:
    return len(data) if data.isascii() else int(np.count_nonzero(_starts(data)))


def _byte_of_character(read: Reader, marks: list[tuple[int, int, Position]], character: int, n_bytes: int) -> int:
    """Return the byte offset of a character, reading from the last mark before it."""
    chars, at, position = next((mark for mark in reversed(marks) if mark[0] <= character), (0, 0, Position(0, 0)))
    for block in read(*position):
        count = _n_characters(block.data)
        if chars + count > character:
            return at + int(np.flatnonzero(_starts(block.data))[character - chars])
        chars, at = chars + count, at + len(block.data)
    return n_bytes
