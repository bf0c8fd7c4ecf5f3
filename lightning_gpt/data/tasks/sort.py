"""The sort task: sort a sequence of symbols, as minGPT's demo does."""

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
_MAX_HELD_OUT = 5000


@dataclass(frozen=True)
class Sort(Task):
    """Sort a sequence of symbols: 201012 is followed by 001122.

    The first quarter of a permutation of all sequences, at most 5,000, is held out. All others are equally likely,
    whereas minGPT's demo prefers sequences with repeated symbols.

    Raises:
        UserError: A field is out of range, or there are more than 2**62 sequences.
    """

    length: int = 6
    """symbols in a sequence"""
    num_symbols: int = 3
    """number of different symbols, 2 to 62: 0-9, a-z, A-Z"""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 62:
            raise UserError(f"--length {self.length}: out of range; give 1 to 62")
        if not 2 <= self.num_symbols <= len(_SYMBOLS):
            raise UserError(f"--num_symbols {self.num_symbols}: out of range; give 2 to {len(_SYMBOLS)}")
        if self.num_symbols**self.length > 2**62:
            raise UserError(
                f"--length {self.length} --num_symbols {self.num_symbols}: more than 2**62 sequences; lower one of them"
            )

    @property
    def tokenizer(self) -> CharTokenizer:
        """Return a tokenizer of the symbols."""
        return CharTokenizer(_SYMBOLS[: self.num_symbols])

    @property
    def prompt_length(self) -> int:
        """Return the number of symbols to sort."""
        return self.length

    @property
    def answer_length(self) -> int:
        """Return the number of sorted symbols."""
        return self.length

    def n_rows(self, split: Split) -> int:
        """Return the number of sequences in a split."""
        sequences = self.num_symbols**self.length
        held_out = min(max(sequences // 4, 1), _MAX_HELD_OUT)
        return {"train": sequences - held_out, "val": held_out}[split]

    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Return sequences, each followed by its symbols sorted, (m, 2 * length) int64."""
        first = {"val": 0, "train": self.n_rows("val")}[split]
        numbers = permute(first + indices, n=self.num_symbols**self.length, key=_SPLIT_KEY)
        symbols = numbers[:, None] // self.num_symbols ** np.arange(self.length) % self.num_symbols
        return np.concatenate([symbols, np.sort(symbols, axis=1)], axis=1)
