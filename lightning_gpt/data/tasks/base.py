"""The interface of a task: questions, each with one right answer, as rows of tokens."""

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
    """Base class of tasks; subclass it as a frozen dataclass.

    The fields become flags of train.py when `--data` names the task, and are saved with the run. A subclass maps an
    index to a row; no row may be in both splits. Check the fields in `__post_init__` and raise a UserError that names
    the flag.
    """

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of questions and answers."""

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """Return the number of tokens of a question, at least 1."""

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Return the number of tokens of an answer, at least 1."""

    @abstractmethod
    def n_rows(self, split: Split) -> int:
        """Return the number of rows in a split, 1 to 2**62."""

    @abstractmethod
    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Return questions, each followed by its answer; must be a pure function of the indices.

        Args:
            split: "train" or "val".
            indices: Row numbers, shape (m,), int64, in range(n_rows(split)).

        Returns:
            Tokens, shape (m, prompt_length + answer_length), int64.
        """

    @property
    def vocab_size(self) -> int:
        """Return the upper bound of the token ids, exclusive."""
        return self.tokenizer.vocab_size

    @property
    def block_size(self) -> int:
        """Return the number of inputs per row: all tokens but the last."""
        return self.prompt_length + self.answer_length - 1

    def prompt(self) -> str:
        """Return a validation question, for the sample at the end of a run."""
        return self.tokenizer.decode(self.rows("val", np.array([0]))[0, : self.prompt_length])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the dataclass."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return one line about the task and its size."""
        fields = ", ".join(f"{name} {value}" for name, value in self.to_dict().items())
        counts = f"{self.n_rows('train'):,} training and {self.n_rows('val'):,} validation rows"
        return f"{type(self).__name__} ({fields}): {counts}" if fields else f"{type(self).__name__}: {counts}"

    def batch(self, split: Split, indices: np.ndarray) -> Batch:
        """Return inputs and targets of rows; targets are -1 except for the tokens of the answer.

        Args:
            split: "train" or "val".
            indices: Row numbers, shape (B,), int64.

        Returns:
            idx and targets, each (B, block_size) int64 and contiguous.
        """
        rows = self.rows(split, indices)
        idx, targets = np.ascontiguousarray(rows[:, :-1]), rows[:, 1:].copy()
        targets[:, : self.prompt_length - 1] = -1
        return torch.from_numpy(idx), torch.from_numpy(targets)

    def train_stream(self, *, block_size: int, seed: int) -> TaskStream:
        """Return the endless stream of training samples."""
        assert block_size == self.block_size
        return TaskStream(self, seed=seed)

    def val_pass(self, *, block_size: int, **share: Any) -> TaskPass:
        """Return a rank's share of the validation split; `share` holds the arguments of EvalPass."""
        assert block_size == self.block_size
        return TaskPass(self, **share)


class TaskStream:
    """Map each sample to a training row; a pass visits every row once, in its own order (see `Stream`)."""

    def __init__(self, task: Task, *, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.n_windows = task.n_rows("train")

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Yield a batch for each row of `samples`: see `Stream`."""
        rows, _ = shuffle(samples.ravel(), n=self.n_windows, seed=self.seed)
        for indices in rows.reshape(samples.shape):
            yield self.task.batch("train", indices)


class TaskPass(EvalPass):
    """One pass over the validation rows that scores each answer exactly once."""

    def __init__(self, task: Task, **share: Any) -> None:
        super().__init__(task.n_rows("val"), **share)
        self.task = task

    def open(self) -> Callable[[np.ndarray], Batch]:
        """Return the reader of batches; rows are computed, so there is no file to open."""
        return self._batch

    def _batch(self, sequences: np.ndarray) -> Batch:
        present = sequences < self.n_sequences
        idx, targets = self.task.batch("val", np.where(present, sequences, 0))
        idx[~present], targets[~present] = 0, -1
        return idx, targets
