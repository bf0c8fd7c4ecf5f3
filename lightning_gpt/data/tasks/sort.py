"""Sorting symbols, as in minGPT's demo."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.data.streams import permute
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.token_files import Split
from lightning_gpt.tokenizers import CharTokenizer

_SYMBOLS = string.digits + string.ascii_letters
_SPLIT_KEY = 1337
_MOST_TESTS = 5000


@dataclass(frozen=True)
class Sort(Task):
    """A sequence of symbols, then the same symbols in order: 201012 is followed by 001122.

    Of a permutation of all sequences, the first quarter, at most 5,000, are held out and never trained on. All others
    are equally likely; those with repeated symbols are not preferred, as minGPT's demo does.

    Raises:
        UserError: A field is out of range, or there are too many sequences to number.
    """

    length: int = 6
    """symbols in a sequence"""
    num_symbols: int = 3
    """how many different symbols there are, 2 to 62: 0-9, a-z, A-Z"""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 62:
            raise UserError(f"--length {self.length}: give 1 to 62")
        if not 2 <= self.num_symbols <= len(_SYMBOLS):
            raise UserError(f"--num_symbols {self.num_symbols}: give 2 to {len(_SYMBOLS)}")
        if self.num_symbols**self.length > 2**62:
            raise UserError(
                f"--length {self.length} with --num_symbols {self.num_symbols} makes more than 2**62 sequences; give"
                " less of either"
            )

    @property
    def tokenizer(self) -> CharTokenizer:
        """A token per symbol."""
        return CharTokenizer(_SYMBOLS[: self.num_symbols])

    @property
    def prompt_length(self) -> int:
        """The symbols as they come."""
        return self.length

    @property
    def answer_length(self) -> int:
        """The symbols in order."""
        return self.length

    def n_rows(self, split: Split) -> int:
        """How many sequences a split has."""
        sequences = self.num_symbols**self.length
        held_out = min(max(sequences // 4, 1), _MOST_TESTS)
        return {"train": sequences - held_out, "val": held_out}[split]

    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Sequences and the same in order: (m, 2 * length) int64."""
        first = {"val": 0, "train": self.n_rows("val")}[split]
        numbers = permute(first + indices, n=self.num_symbols**self.length, key=_SPLIT_KEY)
        symbols = numbers[:, None] // self.num_symbols ** np.arange(self.length) % self.num_symbols
        return np.concatenate([symbols, np.sort(symbols, axis=1)], axis=1)
