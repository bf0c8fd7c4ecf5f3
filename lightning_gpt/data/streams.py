"""The order in which the model sees samples.

Training reads an endless stream that is a pure function of (seed, global sample index): sample k is window pi(k) of
the tokens, with pi a permutation computed on the fly. The only state is how many samples all ranks have consumed, so a
run resumed on any number of ranks, with any micro-batch size, sees the samples of the uninterrupted run. Evaluation
reads the tokens once from front to back and scores every token exactly once.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lightning_gpt.data.tokens.mapping import require_whole

Opener = Callable[[], np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_CHUNK_BATCHES = 256


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the output function of SplitMix64 (Steele, Lea, Flood 2014), a pseudorandom bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(x: np.ndarray, salt: int) -> np.ndarray:
    return _mix(x + np.uint64(salt * _GOLDEN & _MASK))


def permute(index: np.ndarray, *, n: int, key: int | np.ndarray) -> np.ndarray:
    """Permute range(n) pseudorandomly, in constant memory: each value is computed independently.

    A generalised Feistel cipher on pairs (left, right) of Z_a x Z_b with a * b just above n: each round adds a hash of
    one half to the other. Cycle walking repeats the cipher until the result is in range(n) (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").

    Args:
        index: Indices to permute, shape (m,), any integer dtype, values in range(n).
        n: Size of the permuted range, 1 to 2**62.
        key: Selects the permutation: an integer, or one per index, shape (m,).

    Returns:
        The permuted indices, shape (m,), int64.

    Raises:
        ValueError: An index is outside range(n), or n is out of bounds.
    """
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"n is {n}, it must be between 1 and 2**62")
    x = np.asarray(index)
    if x.size and (x.min() < 0 or x.max() >= n):
        raise ValueError(f"an index is outside range({n})")
    x = x.astype(np.uint64)
    keys = np.atleast_1d(np.asarray(key if isinstance(key, np.ndarray) else key & _MASK, dtype=np.uint64))
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    x = _feistel(x, keys, a, b)
    while True:
        outside = np.flatnonzero(x >= np.uint64(n))
        if not outside.size:
            return x.astype(np.int64)
        x[outside] = _feistel(x[outside], keys if keys.size == 1 else keys[outside], a, b)


def _feistel(x: np.ndarray, keys: np.ndarray, a: int, b: int) -> np.ndarray:
    half, size_a, size_b = np.uint64(32), np.uint64(a), np.uint64(b)
    left, right = x // size_b, x % size_b  # in Z_a, in Z_b
    for round_number in range(1, _ROUNDS + 1):
        round_key = _hash(keys, round_number)
        # (32 random bits * a) >> 32 is in Z_a without a division; a and b are below 2**32.
        if round_number % 2:
            left = (left + ((_mix(right * np.uint64(_GOLDEN) + round_key) >> half) * size_a >> half)) % size_a
        else:
            right = (right + ((_mix(left * np.uint64(_GOLDEN) + round_key) >> half) * size_b >> half)) % size_b
    return left * size_b + right


def shuffle(samples: np.ndarray, *, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Map an endless stream of samples to range(n): each pass visits every number once, in an order of its own.

    Args:
        samples: Global sample indices, counted from 0 over all passes, shape (m,), int64.
        n: Numbers per pass.
        seed: Any integer; another seed gives another order.

    Returns:
        Numbers in range(n), shape (m,), int64; and the key of each sample's pass, uint64, shape (m,), or (1,) if all
        samples are in one pass.
    """
    passes, numbers = np.divmod(np.asarray(samples, dtype=np.int64), n)
    if passes.size and passes[0] == passes[-1] and (passes == passes[0]).all():
        passes = passes[:1]  # one shared key is faster than one per sample
    keys = _hash(_hash(passes.astype(np.uint64), 1) ^ _hash(np.array([seed & _MASK], dtype=np.uint64), 2), 3)
    return permute(numbers, n=n, key=keys), keys


class Stream(Protocol):
    """An endless stream of training samples, each a pure function of its global index.

    Attributes:
        n_windows: Samples per pass.
    """

    n_windows: int

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Yield a batch for each row of `samples`.

        Args:
            samples: Global sample indices, shape (n_batches, B), int64.

        Yields:
            (idx, targets), each (B, T) int64.
        """
        ...


class TokenStream:
    """Map each training sample to a window of an array of tokens.

    The tokens are cut into windows of `block_size` inputs, and a pass visits every window once, in its own order. If
    there are enough tokens, each pass leaves one window out and cuts at another offset, so that over many passes a
    token is seen at every position of a window.

    Args:
        opener: Picklable function that maps the tokens, shape (n_tokens,), into memory; called repeatedly.
        n_tokens: Number of tokens.
        block_size: Inputs per sample, T.
        seed: Any integer; another seed gives another order.

    Attributes:
        n_windows: Samples per pass.

    Raises:
        ValueError: Fewer than block_size + 1 tokens.
    """

    def __init__(self, opener: Opener, *, n_tokens: int, block_size: int, seed: int) -> None:
        if n_tokens < block_size + 1:
            raise ValueError(f"{n_tokens} tokens are too few for a block_size of {block_size}")
        self.opener = opener
        self.n_tokens = n_tokens
        self.block_size = block_size
        self.seed = seed
        self.n_windows = (n_tokens - 1) // block_size
        if n_tokens >= 3 * block_size + 1:
            self.n_windows -= 1
        self._slack = n_tokens - 1 - self.n_windows * block_size

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Return where samples start: a pure function of the seed and the global sample indices.

        Args:
            samples: Global sample indices, counted from 0 over all passes, shape (m,), int64.

        Returns:
            Position of each sample's first input token, shape (m,), int64.
        """
        windows, keys = shuffle(samples, n=self.n_windows, seed=self.seed)
        offsets = (_hash(keys, _ROUNDS + 1) % np.uint64(self._slack + 1)).astype(np.int64)
        return offsets + self.block_size * windows

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Yield a batch for each row of `samples`, from a fresh memory map: see `Stream`."""
        tokens = self.opener()
        windows = window_view(tokens, self.block_size)
        for starts in self.starts(samples.ravel()).reshape(samples.shape):
            require_whole(tokens)
            yield gather_windows(windows, starts)


def window_view(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """View tokens as all windows of block_size + 1 tokens, (n_tokens - block_size, block_size + 1), without a copy."""
    plain = tokens.view(np.ndarray)  # indexing a memmap runs slow Python code
    return np.lib.stride_tricks.sliding_window_view(plain, block_size + 1)


def gather_windows(windows: np.ndarray, starts: np.ndarray) -> Batch:
    """Copy a batch of windows from a `window_view`; see `gather`."""
    picked = windows[starts]  # (B, T + 1)
    batch = np.empty((2, len(starts), picked.shape[1] - 1), dtype=np.int64)
    batch[0] = picked[:, :-1]
    batch[1] = picked[:, 1:]
    idx, targets = torch.from_numpy(batch).unbind(0)  # both contiguous, for models that call .view(-1)
    return idx, targets


def gather(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> Batch:
    """Copy inputs and targets of windows from the tokens.

    Args:
        tokens: Tokens, shape (n_tokens,), usually a memory map.
        starts: Position of each window's first input, shape (B,).
        block_size: Inputs per sample, T.

    Returns:
        idx and targets, each (B, T) int64 and contiguous; targets are the inputs shifted left by one.
    """
    return gather_windows(window_view(tokens, block_size), starts)


class TrainBatches(IterableDataset[Batch]):
    """Yield the endless training batches of one rank, for DataLoader(..., batch_size=None).

    Micro-batch m of rank r holds the samples first_sample + m*B*R + i*R + r for i in range(B). Loader workers take
    micro-batches in turn, so the order does not depend on their number.

    Args:
        stream: Source of the samples.
        batch_size: Samples per micro-batch, B.
        rank: This rank, r.
        world_size: Number of ranks, R.
        first_sample: Samples that all ranks together have already consumed.
    """

    def __init__(
        self, stream: Stream, *, batch_size: int, rank: int = 0, world_size: int = 1, first_sample: int = 0
    ) -> None:
        assert batch_size >= 1 and 0 <= rank < world_size and first_sample >= 0
        self.stream = stream
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.first_sample = first_sample

    def __iter__(self) -> Iterator[Batch]:
        """Yield (idx, targets), each (B, T) int64, without end."""
        micro_batch, stride = _worker_turn()
        per_batch = self.batch_size * self.world_size
        rows = self.first_sample + self.rank + np.arange(self.batch_size) * self.world_size
        while True:
            # Pages of a memory map count as resident memory until it is dropped, so each chunk opens a new one.
            turns = micro_batch + stride * np.arange(_CHUNK_BATCHES)
            yield from self.stream.batches(turns[:, None] * per_batch + rows)  # (batches, B)
            micro_batch += stride * _CHUNK_BATCHES


class EvalPass(IterableDataset[Batch], ABC):
    """Yield one pass over a split from front to back, for DataLoader(..., batch_size=None).

    All ranks yield the same number of batches of equal size. Padding rows have idx 0 and target -1: sum losses and
    counts of targets >= 0, and divide at the end. The mean loss of a batch of padding is NaN.

    Args:
        n_sequences: Number of sequences in the split.
        batch_size: Sequences per batch, B.
        rank: This rank; rank r of R takes sequences r, r + R, ...
        world_size: Number of ranks, R.
        limit_sequences: Stop after this many sequences, counted over all ranks; None for all.

    Attributes:
        n_sequences: Number of sequences that all ranks together yield.
    """

    def __init__(
        self,
        n_sequences: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit_sequences: int | None = None,
    ) -> None:
        assert batch_size >= 1 and 0 <= rank < world_size and (limit_sequences is None or limit_sequences >= 1)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.n_sequences = n_sequences if limit_sequences is None else min(n_sequences, limit_sequences)

    @abstractmethod
    def open(self) -> Callable[[np.ndarray], Batch]:
        """Return a function from sequence numbers (B,) to (idx, targets), each (B, T) int64; called repeatedly.

        Numbers from `n_sequences` on are padding.
        """

    def __len__(self) -> int:
        """Return the number of batches per rank, the same on every rank."""
        return -(-self.n_sequences // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield (idx, targets), each (B, T) int64."""
        first, stride = _worker_turn()
        for number in range(first, len(self), stride):
            if number // stride % _CHUNK_BATCHES == 0:
                read = self.open()
            yield read((number * self.batch_size + np.arange(self.batch_size)) * self.world_size + self.rank)


class EvalBatches(EvalPass):
    """Yield one pass over the tokens of a split.

    Sequence w starts at token w*S and has targets w*S+1 to w*S+T; the last sequence may be shorter. The first sequence
    scores all its targets and the others their last S, so every token but the first is scored exactly once, by the
    sequence that gives it the most context.

    Args:
        opener: Picklable function that maps the tokens, shape (n_tokens,), into memory; called repeatedly.
        n_tokens: Number of tokens.
        block_size: Inputs per sequence, T.
        stride: Tokens between the starts of two sequences, S, from 1 to T; None means T, without overlap.
        batch_size: Sequences per batch, B.
        rank: This rank; rank r of R takes sequences r, r + R, ...
        world_size: Number of ranks, R.
        limit_sequences: Stop after this many sequences, counted over all ranks; None for all.

    Raises:
        ValueError: Fewer than 2 tokens.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        n_tokens: int,
        block_size: int,
        stride: int | None = None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit_sequences: int | None = None,
    ) -> None:
        if n_tokens < 2:
            raise ValueError(f"{n_tokens} tokens are too few to score one")
        self.stride = stride or block_size
        assert 1 <= self.stride <= block_size
        super().__init__(
            1 + max(0, -(-(n_tokens - 1 - block_size) // self.stride)),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            limit_sequences=limit_sequences,
        )
        self.opener = opener
        self.n_tokens = n_tokens
        self.block_size = block_size

    def open(self) -> Callable[[np.ndarray], Batch]:
        """Return the reader of batches from a fresh memory map."""
        return functools.partial(self._batch, self.opener())

    def _batch(self, tokens: np.ndarray, sequences: np.ndarray) -> Batch:
        columns = np.arange(self.block_size + 1)
        positions = sequences[:, None] * self.stride + columns  # (B, T + 1)
        present = (positions < self.n_tokens) & (sequences < self.n_sequences)[:, None]
        require_whole(tokens)
        picked = tokens.view(np.ndarray)[np.where(present, positions, 0)].astype(np.int64)
        has_target = present[:, 1:]
        is_new = (columns[1:] > self.block_size - self.stride) | (sequences == 0)[:, None]
        idx = np.where(has_target, picked[:, :-1], 0)
        targets = np.where(has_target & is_new, picked[:, 1:], -1)
        return torch.from_numpy(idx), torch.from_numpy(targets)


def _worker_turn() -> tuple[int, int]:
    """Return this loader worker's first batch and its stride: 0 and 1 in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
