"""The interface of tokenizers."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lightning_gpt.config import UserError

# Largest vocabulary, above any in use. A model has a row for each token, so a damaged number must not decide on it.
MAX_VOCAB = 1 << 22


class Tokenizer(ABC):
    """Convert text to token ids and back; picklable.

    Attributes:
        name: Name for messages; also the value of ``--tokenizer``, unless that is a file.
        vocab_size: Upper bound of the token ids, exclusive.
        end_of_text: Id of the token that separates documents, or None.
    """

    name: str
    vocab_size: int
    end_of_text: int | None = None

    @classmethod
    @abstractmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> Tokenizer:
        """Build the tokenizer that ``--tokenizer`` names, from the training text if it depends on it."""

    @classmethod
    @abstractmethod
    def from_dict(cls, fields: dict[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer from the result of `to_dict`."""

    @classmethod
    def keep_tables(cls, spelling: str, path: str) -> None:
        """Check the tables of ``--tokenizer_file`` and copy them to the cache folder for later runs.

        Raises:
            UserError: The tokenizer has no tables, or these are not its tables.
        """
        raise UserError(
            f"--tokenizer_file holds the tables of a tiktoken encoding, such as gpt2, but --tokenizer is {spelling}; "
            "leave it out"
        )

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, int64 (n_tokens,); special tokens in it are encoded as plain text."""

    @abstractmethod
    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Return the token ids of a piece of a corpus, shape (n_tokens,), in an unsigned dtype.

        Runs on one core; several threads may call it at once.

        Args:
            data: The bytes of the piece.
            source: Name of the corpus for error messages.
            offset: Byte offset of the piece in the corpus, for error messages.

        Raises:
            UserError: The tokenizer needs UTF-8 and `data` is not, or a character has no token.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids.

        Incomplete UTF-8, such as half a character at the end of a sample, and unused ids become U+FFFD, the replacement
        character.

        Raises:
            UserError: An id is not in the vocabulary.
        """

    def cut(self, data: bytes, start: int) -> int | None:
        """Find where UTF-8 text can be cut so that the tokens of both sides concatenate to the tokens of the whole.

        The cut is valid whatever comes before and after `data`.

        Args:
            data: A text.
            start: Byte offset where the search starts.

        Returns:
            The first such offset from `start` on, with at least one byte on each side; None if there is none in
            `data`, or if no rule is known for the tokenizer.
        """
        return None

    def answers_to(self, spelling: str) -> bool:
        """Return whether this value of ``--tokenizer`` may mean this tokenizer."""
        return spelling == self.name

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, in JSON types."""
        return {"name": self.name}

    def _checked(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"token {outside[0]} is not in the {self.name} tokenizer's vocabulary of {self.vocab_size}: "
                "the model was trained with another tokenizer"
            )
        return array


def saved_sizes(fields: dict[str, Any], *, what: str) -> tuple[int, int | None]:
    """Return the size of the vocabulary and the end-of-text id of a saved tokenizer.

    Args:
        fields: The result of `to_dict`.
        what: Names of the required fields, for the error message.

    Raises:
        UserError: One of them is missing or wrong.
    """
    size, end = fields.get("vocab_size"), fields.get("end_of_text")
    if type(size) is int and 1 <= size <= MAX_VOCAB:
        if end is None or (type(end) is int and 0 <= end < size):
            return size, end
    raise UserError(f"a saved {what}")


def around_gaps(tokens: list[int], is_known: Callable[[int], bool], decode: Callable[[list[int]], str]) -> str:
    """Decode tokens, with U+FFFD for unused ids, which a model may sample."""
    runs = ((known, list(run)) for known, run in itertools.groupby(tokens, is_known))
    return "".join(decode(run) if known else "\ufffd" * len(run) for known, run in runs)


def as_text(data: bytes, *, source: str, offset: int = 0) -> str:
    """Decode UTF-8.

    Args:
        data: A piece of a corpus.
        source: Name of the corpus for the error message.
        offset: Byte offset of the piece in the corpus.

    Raises:
        UserError: The data is not UTF-8; the message names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {offset + error.start} is 0x{data[error.start]:02X}); "
            "convert it, or use --tokenizer byte"
        ) from None


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
