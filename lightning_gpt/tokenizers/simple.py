"""Tokenizers that need no tables: one token per character, or per byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import Tokenizer, as_text


class CharTokenizer(Tokenizer):
    """One token per character of the training text, as in nanoGPT's character-level data sets.

    Args:
        chars: The vocabulary; the token id of a character is its place in this string.

    Raises:
        UserError: The vocabulary is empty or names a character twice.
    """

    name = "char"

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a char tokenizer needs a vocabulary of one or more different characters")
        self.chars = chars
        self.vocab_size = len(chars)
        self._points = _code_points(chars)
        self._ids = np.full(int(self._points.max()) + 1, -1, dtype=np.int32)  # code point -> id
        self._ids[self._points] = np.arange(len(chars))

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> CharTokenizer:
        """The sorted different characters of a corpus."""
        if corpus is None:
            raise UserError(
                "--tokenizer char takes its vocabulary from a training text and there is none; use --tokenizer byte"
            )
        return cls("".join(sorted(set(as_text(corpus, source=source)))))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CharTokenizer:
        """Rebuild the tokenizer from what `to_dict` returned."""
        chars = fields.get("chars")
        if not isinstance(chars, str):
            raise UserError("a saved char tokenizer needs a text field 'chars'")
        return cls(chars)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_characters,), int64.

        Raises:
            UserError: A character of the text is not in the vocabulary.
        """
        return self._lookup(text).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Token ids of a UTF-8 corpus, shape (n_characters,), uint32."""
        text = as_text(data, source=source, offset=offset)
        try:
            return self._lookup(text).astype(np.uint32)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids, one character each."""
        points = self._points[self._checked(ids)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def cut(self, data: bytes, start: int) -> int | None:
        """Anywhere between two characters."""
        first = max(start, 1)
        # A byte that goes on with a character is 0b10xxxxxx; there are at most three.
        return next((at for at in range(first, len(data)) if data[at] & 0xC0 != 0x80), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in JSON's types."""
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
    """One token per byte of the UTF-8 text: 256 tokens, able to hold any data."""

    name = "byte"
    vocab_size = 256

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> ByteTokenizer:
        """Needs nothing from the corpus."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ByteTokenizer:
        """Needs nothing but its name."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, shape (n_bytes,), int64."""
        # Bytes of the command line that are not UTF-8 reach Python as escaped surrogates: give them back as bytes.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """The bytes themselves, shape (n_bytes,), uint8, read-only and without a copy."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some bytes."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def cut(self, data: bytes, start: int) -> int | None:
        """Anywhere."""
        first = max(start, 1)
        return first if first < len(data) else None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
