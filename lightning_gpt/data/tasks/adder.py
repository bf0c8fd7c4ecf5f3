"""Adding numbers digit by digit, as in minGPT's project of that name."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass

import numpy as np
import torch

from lightning_gpt.config import UserError
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.token_files import Split
from lightning_gpt.tokenizers import CharTokenizer

_SPLIT_SEED = 1337
_MOST_TESTS = 500


@dataclass(frozen=True)
class Adder(Task):
    """The sum of two numbers: 85 + 50 = 135 is the row 8550531, the sum backwards, as it is worked out.

    The split is minGPT's: of a permutation of all pairs, the first 20 %, at most 500, are held out.

    Raises:
        UserError: `ndigit` is not from 1 to 3.
    """

    ndigit: int = 2
    """digits of each of the two numbers, 1 to 3"""

    def __post_init__(self) -> None:
        if not 1 <= self.ndigit <= 3:
            raise UserError(
                f"--ndigit {self.ndigit}: give 1, 2 or 3; the split is a permutation of all pairs of numbers, 800 MB at"
                " 4 digits"
            )

    @property
    def tokenizer(self) -> CharTokenizer:
        """A token per digit."""
        return CharTokenizer(string.digits)

    @property
    def prompt_length(self) -> int:
        """The digits of both numbers."""
        return 2 * self.ndigit

    @property
    def answer_length(self) -> int:
        """The digits of the sum."""
        return self.ndigit + 1

    def n_rows(self, split: Split) -> int:
        """How many pairs a split has."""
        pairs = 100**self.ndigit
        held_out = min(pairs // 5, _MOST_TESTS)
        return {"train": pairs - held_out, "val": held_out}[split]

    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Both numbers with leading zeros, then their sum backwards: (m, 3 * ndigit + 1) int64."""
        first = {"val": 0, "train": self.n_rows("val")}[split]
        a, b = np.divmod(_permuted_pairs(self.ndigit)[first + indices], 10**self.ndigit)
        up = 10 ** np.arange(self.ndigit + 1)  # place values, from the last digit on
        down = up[-2::-1]
        digits = [number[:, None] // places % 10 for number, places in ((a, down), (b, down), (a + b, up))]
        return np.concatenate(digits, axis=1)


@functools.cache
def _permuted_pairs(ndigit: int) -> np.ndarray:
    """All pairs (a, b) as a * 10**ndigit + b in minGPT's order, shape (100**ndigit,), int64."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    return torch.randperm(100**ndigit, generator=generator).numpy()
