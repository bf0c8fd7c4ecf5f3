"""What a task offers: questions, each with one right answer, as rows of tokens."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lightning_gpt.data.streams import Batch, EvalPass, shuffle
from lightning_gpt.data.tokens.token_files import Split
from lightning_gpt.tokenizers import Tokenizer


class Task(ABC):
    """Questions and answers, to be subclassed as a frozen dataclass.

    Its fields become flags of train.py when `--data` names it. They are saved with a run, which then needs no flags. A
    subclass says which row an index means; a row that is of the validation split is of no use if it is also trained on.
    Checks of its fields belong in `__post_init__` and raise a UserError that names the flag.
    """

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Between tokens and text."""

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """Tokens of a question, at least 1."""

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Tokens of an answer, at least 1."""

    @abstractmethod
    def n_rows(self, split: Split) -> int:
        """How many rows a split has, at least 1 and at most 2**62."""

    @abstractmethod
    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Questions, each followed by its answer: a pure function of the indices.

        Args:
            split: "train" or "val".
            indices: Which rows, shape (m,), int64, in range(n_rows(split)).

        Returns:
            Tokens, shape (m, prompt_length + answer_length), int64.
        """

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self.tokenizer.vocab_size

    @property
    def block_size(self) -> int:
        """Inputs of a row: all its tokens but the last one."""
        return self.prompt_length + self.answer_length - 1

    def prompt(self) -> str:
        """A question of the validation split, for the sample at the end of a run."""
        return self.tokenizer.decode(self.rows("val", np.array([0]))[0, : self.prompt_length])

    def describe(self) -> str:
        """The task and its size, for people."""
        fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())
        counts = f"{self.n_rows('train'):,} training and {self.n_rows('val'):,} validation rows"
        return f"{type(self).__name__} ({fields}): {counts}" if fields else f"{type(self).__name__}: {counts}"

    def batch(self, split: Split, indices: np.ndarray) -> Batch:
        """Inputs and targets of some rows; the targets are -1 but where a token of the answer is asked for.

        Args:
            split: "train" or "val".
            indices: Which rows, shape (B,), int64.

        Returns:
            idx and targets, each (B, block_size) int64 and contiguous.
        """
        rows = self.rows(split, indices)
        idx, targets = np.ascontiguousarray(rows[:, :-1]), rows[:, 1:].copy()
        targets[:, : self.prompt_length - 1] = -1
        return torch.from_numpy(idx), torch.from_numpy(targets)

    def train_stream(self, *, block_size: int, seed: int) -> TaskStream:
        """The endless training samples."""
        assert block_size == self.block_size
        return TaskStream(self, seed=seed)

    def val_pass(self, *, block_size: int, **share: Any) -> TaskPass:
        """A rank's share of the validation split; `share` are the arguments of EvalPass."""
        assert block_size == self.block_size
        return TaskPass(self, **share)


class TaskStream:
    """Which training row each sample is: a pass visits every one once, in an order of its own (see `Stream`)."""

    def __init__(self, task: Task, *, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.n_windows = task.n_rows("train")

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Batches of given samples: see `Stream`."""
        rows, _ = shuffle(samples.ravel(), n=self.n_windows, seed=self.seed)
        for indices in rows.reshape(samples.shape):
            yield self.task.batch("train", indices)


class TaskPass(EvalPass):
    """One pass over the validation rows, each answer scored exactly once."""

    def __init__(self, task: Task, **share: Any) -> None:
        super().__init__(task.n_rows("val"), **share)
        self.task = task

    def open(self) -> Callable[[np.ndarray], Batch]:
        """Rows are made up, there is nothing to open."""
        return self._batch

    def _batch(self, sequences: np.ndarray) -> Batch:
        present = sequences < self.n_sequences
        idx, targets = self.task.batch("val", np.where(present, sequences, 0))
        idx[~present], targets[~present] = 0, -1
        return idx, targets
