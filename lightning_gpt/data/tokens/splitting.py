"""Which part of a text is for training and which for validation: the tail of it, or documents that are drawn."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lightning_gpt.data.text.documents import Block
from lightning_gpt.data.tokens.encoding import Position, Span

_MARK_BYTES = 16 << 20
_LAST_CODE_POINT = 0x10FFFF

Reader = Callable[[int, int], Iterator[Block]]  # from which document on, and from which of its bytes


@dataclass(frozen=True)
class Survey:
    """What a first look over a whole text tells.

    Attributes:
        n_bytes: Its length.
        boundary: Byte at which the tail begins that is kept for validation; between two characters where the text is
            UTF-8.
        alphabet: Its different characters, sorted; empty where the text is not UTF-8 or nobody asked.
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
    """Read a text once, to know its characters.

    The tail begins at character int((1 - val_fraction) * number of characters), as nanoGPT has it.

    Args:
        read: Gives the text.
        val_fraction: Share of the characters that is kept for validation.
        alphabet: Whether to collect the different characters.
        progress: Is told how much of the documents' `size` has been read.
        not_utf8: Is told of the first block that is not UTF-8, with the first bytes that are wrong; may raise.
    """
    decoder, valid = codecs.getincrementaldecoder("utf-8")(), True
    seen = np.zeros(_LAST_CODE_POINT + 1, dtype=bool)
    n_bytes = n_chars = document = 0
    marks: list[tuple[int, int, Position]] = []  # characters and bytes before a place
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
    """All documents as one text, of which the tail is for validation.

    Args:
        read: Gives the text.
        found: Its survey.
        start: The position to start from.
        done: How many bytes lie before it.
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
        split = "val" if at > found.boundary else "train"
        yield Span(rest.data, split, ends_text, rest.ends, rest.where, rest.offset, rest.disk)


def by_document(read: Reader, *, val_fraction: float, seed: int, start: Position) -> Iterator[Span]:
    """Each document as a text of its own; the seed and its number decide which split it belongs to.

    Args:
        read: Gives the text.
        val_fraction: Chance of a document to be for validation.
        seed: Seed of the draw.
        start: The position to start from.
    """
    document = start.document
    for block in read(*start):
        split = "val" if _draw(seed, document) < val_fraction else "train"
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
    """Which bytes begin a character of UTF-8, shape (n_bytes,), bool."""
    return np.frombuffer(data, np.uint8) & 0xC0 != 0x80


def _n_characters(data: bytes) -> int:
    return len(data) if data.isascii() else int(np.count_nonzero(_starts(data)))


def _byte_of_character(read: Reader, marks: list[tuple[int, int, Position]], character: int, n_bytes: int) -> int:
    chars, at, position = next((mark for mark in reversed(marks) if mark[0] <= character), (0, 0, Position(0, 0)))
    for block in read(*position):
        count = _n_characters(block.data)
        if chars + count > character:
            return at + int(np.flatnonzero(_starts(block.data))[character - chars])
        chars, at = chars + count, at + len(block.data)
    return n_bytes
