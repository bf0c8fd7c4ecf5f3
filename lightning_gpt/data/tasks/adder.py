"""The adder task: add two numbers digit by digit, as minGPT's adder project does."""

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
_MAX_HELD_OUT = 500


@dataclass(frozen=True)
class Adder(Task):
    """Add two numbers: 85 + 50 = 135 is the row 8550531. The sum is reversed, because carries run from the right.

    As in minGPT, the first 20 % of a permutation of all pairs, at most 500, are held out.

    Raises:
        UserError: `ndigit` is not 1, 2 or 3.
    """

    ndigit: int = 2
    """digits of each of the two numbers, 1 to 3"""

    def __post_init__(self) -> None:
        if not 1 <= self.ndigit <= 3:
            # The split permutes all pairs, which takes 800 MB at 4 digits.
            raise UserError(f"--ndigit {self.ndigit}: out of range; give 1, 2 or 3")

    @property
    def tokenizer(self) -> CharTokenizer:
        """Return a tokenizer of the ten digits."""
        return CharTokenizer(string.digits)

    @property
    def prompt_length(self) -> int:
        """Return the number of digits of both numbers."""
        return 2 * self.ndigit

    @property
    def answer_length(self) -> int:
        """Return the number of digits of the sum."""
        return self.ndigit + 1

    def n_rows(self, split: Split) -> int:
        """Return the number of pairs in a split."""
        pairs = 100**self.ndigit
        held_out = min(pairs // 5, _MAX_HELD_OUT)
        return {"train": pairs - held_out, "val": held_out}[split]

    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Return both numbers with leading zeros and their sum reversed, (m, 3 * ndigit + 1) int64."""
        first = {"val": 0, "train": self.n_rows("val")}[split]
        a, b = np.divmod(_permuted_pairs(self.ndigit)[first + indices], 10**self.ndigit)
        up = 10 ** np.arange(self.ndigit + 1)  # place values, last digit first
        down = up[-2::-1]
        digits = [number[:, None] // places % 10 for number, places in ((a, down), (b, down), (a + b, up))]
        return np.concatenate(digits, axis=1)


@functools.cache
def _permuted_pairs(ndigit: int) -> np.ndarray:
    """Return all pairs (a, b) as a * 10**ndigit + b in minGPT's order, (100**ndigit,) int64."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    return torch.randperm(100**ndigit, generator=generator).numpy()
