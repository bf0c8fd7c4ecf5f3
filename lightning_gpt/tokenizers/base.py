"""What every tokenizer offers."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lightning_gpt.config import UserError


class Tokenizer(ABC):
    """Text to token ids and back; plain enough to be sent to another process.

    Attributes:
        name: What it is called in messages, and on the command line where it needs no file.
        vocab_size: How many token ids there are; ids run from 0 to vocab_size - 1.
        end_of_text: Id of the token that separates documents, or None where there is none.
    """

    name: str
    vocab_size: int
    end_of_text: int | None = None

    @classmethod
    @abstractmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> Tokenizer:
        """Build what ``--tokenizer`` names, from the training text where it depends on one."""

    @classmethod
    @abstractmethod
    def from_dict(cls, fields: dict[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer from what `to_dict` returned."""

    @classmethod
    def keep_tables(cls, spelling: str, path: str) -> None:
        """Put the tables of ``--tokenizer_file`` where they are found from now on.

        Raises:
            UserError: The tokenizer has no tables of its own, or these are not the right ones.
        """
        raise UserError(
            f"--tokenizer_file holds the tables of gpt2 or of another tiktoken encoding, and --tokenizer is {spelling};"
            " leave it out"
        )

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_tokens,), int64. Special tokens written out in it are plain text."""

    @abstractmethod
    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Token ids of a piece of a corpus, shape (n_tokens,), in whatever unsigned type holds them.

        It works on one core, and may be called from several threads at once.

        Args:
            data: The piece as it lies in its file.
            source: What to call the corpus in an error message.
            offset: Where in the corpus the piece begins, in bytes; for error messages alone.

        Raises:
            UserError: The tokenizer needs UTF-8 text and `data` is none, or a character has no token.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids.

        Bytes that are not UTF-8 (a sample may end inside a character) and unused ids of the vocabulary become U+FFFD.

        Raises:
            UserError: An id is not in the vocabulary.
        """

    def cut(self, data: bytes, start: int) -> int | None:
        """Where UTF-8 text may be cut so that its two sides have the tokens of the whole, one after the other.

        The cut holds whatever comes before and after `data`.

        Args:
            data: A text.
            start: The byte from which on a cut is looked for.

        Returns:
            The first such byte from `start` on, with at least a byte on each side; None where there is none in `data`,
            or where no rule is known for the tokenizer.
        """
        return None

    def answers_to(self, spelling: str) -> bool:
        """Whether ``--tokenizer`` with this value may mean this tokenizer."""
        return spelling == self.name

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in JSON's types."""
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


def around_gaps(tokens: list[int], is_known: Callable[[int], bool], decode: Callable[[list[int]], str]) -> str:
    """The text of tokens, with U+FFFD for an id that the vocabulary leaves unused, which a model may draw as well."""
    runs = ((known, list(run)) for known, run in itertools.groupby(tokens, is_known))
    return "".join(decode(run) if known else "\ufffd" * len(run) for known, run in runs)


def as_text(data: bytes, *, source: str, offset: int = 0) -> str:
    """Decode UTF-8.

    Args:
        data: A piece of a corpus.
        source: What to call the corpus in the error message.
        offset: Where in the corpus the piece begins, in bytes.

    Raises:
        UserError: It is not UTF-8; names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {offset + error.start} is 0x{data[error.start]:02X}); "
            "convert it, or use --tokenizer byte"
        ) from None


def without_surrogates(text: str) -> str:
    """A text with U+FFFD in the place of lone surrogates, which stand for no character and are in no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
