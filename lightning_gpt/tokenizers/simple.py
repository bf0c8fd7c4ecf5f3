"""Tokenizers without tables: one token per character, or per byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import Tokenizer, as_text


class CharTokenizer(Tokenizer):
    """One token per character of the training text, as in nanoGPT's character-level data sets.

    Args:
        chars: The vocabulary; a character's token id is its index in this string.

    Raises:
        UserError: The vocabulary is empty or repeats a character.
    """

    name = "char"

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a char tokenizer needs a vocabulary of one or more distinct characters")
        self.chars = chars
        self.vocab_size = len(chars)
        self._points = _code_points(chars)
        self._ids = np.full(int(self._points.max()) + 1, -1, dtype=np.int32)  # code point -> id
        self._ids[self._points] = np.arange(len(chars))

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> CharTokenizer:
        """Build the vocabulary: the sorted distinct characters of the corpus."""
        if corpus is None:
            raise UserError(
                "--tokenizer char: there is no training text to take the vocabulary from; use --tokenizer byte"
            )
        return cls("".join(sorted(set(as_text(corpus, source=source)))))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CharTokenizer:
        """Rebuild the tokenizer from the result of `to_dict`."""
        chars = fields.get("chars")
        if not isinstance(chars, str):
            raise UserError("a saved char tokenizer needs a text field 'chars'")
        return cls(chars)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, shape (n_characters,), int64.

        Raises:
            UserError: A character of the text is not in the vocabulary.
        """
        return self._lookup(text).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Return the token ids of UTF-8 text, shape (n_characters,), uint32."""
        text = as_text(data, source=source, offset=offset)
        try:
            return self._lookup(text).astype(np.uint32)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids, one character each."""
        points = self._points[self._checked(ids)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def cut(self, data: bytes, start: int) -> int | None:
        """Cut between any two characters."""
        first = max(start, 1)
        # Continuation bytes of a character are 0b10xxxxxx; there are at most three.
        return next((at for at in range(first, len(data)) if data[at] & 0xC0 != 0x80), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, in JSON types."""
        return {"name": self.name, "chars": self.chars}

    def _lookup(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        missing = (ids < 0) | (points >= len(self._ids))
        if missing.any():
            char = text[int(missing.argmax())]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not in this tokenizer's vocabulary of {self.vocab_size} "
                "characters; use only characters of the training text, or train with --tokenizer byte"
            )
        return ids


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8 text: 256 tokens, which can represent any data."""

    name = "byte"
    vocab_size = 256

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> ByteTokenizer:
        """Build the tokenizer; needs no corpus."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ByteTokenizer:
        """Rebuild the tokenizer; needs only the name."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of a text, shape (n_bytes,), int64."""
        # Python escapes command-line bytes that are not UTF-8 as surrogates; turn them back into bytes.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Return the bytes, shape (n_bytes,), uint8, read-only and without a copy."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of bytes."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def cut(self, data: bytes, start: int) -> int | None:
        """Cut anywhere."""
        first = max(start, 1)
        return first if first < len(data) else None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
