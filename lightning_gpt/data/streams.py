"""In what order the model sees the tokens.

Training reads an endless stream that is a pure function of (seed, global sample index): sample k is window pi(k) of
the corpus, pi a permutation computed on the fly. The only state is how many samples all ranks have consumed, so a run
resumed on any number of ranks with any micro-batch size sees what the uninterrupted run would have. Evaluation reads
the corpus once from front to back and scores every token exactly once.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

Opener = Callable[[], np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_CHUNK_BATCHES = 256


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64 that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(x: np.ndarray, salt: int) -> np.ndarray:
    return _mix(x + np.uint64(salt * _GOLDEN & _MASK))


def permute(index: np.ndarray, *, n: int, key: int | np.ndarray) -> np.ndarray:
    """A keyed pseudorandom permutation of range(n), each value computed by itself in constant memory.

    A Feistel network on pairs (left, right) of Z_a x Z_b with a * b just above n, whose rounds add a hash of one half
    to the other; a result outside range(n) is sent round again until it is inside (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains": the generalised Feistel cipher and cycle walking).

    Args:
        index: What to permute, shape (m,), any integer type, values in range(n).
        n: Size of the permuted range, 1 to 2**62.
        key: Which permutation: a whole number, or one for each index, shape (m,).

    Returns:
        The permuted indices, shape (m,), int64.

    Raises:
        ValueError: An index is outside range(n), or n outside its bounds.
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
        # (32 random bits * a) >> 32 is a number in Z_a without a division; a and b are below 2**32.
        if round_number % 2:
            left = (left + ((_mix(right * np.uint64(_GOLDEN) + round_key) >> half) * size_a >> half)) % size_a
        else:
            right = (right + ((_mix(left * np.uint64(_GOLDEN) + round_key) >> half) * size_b >> half)) % size_b
    return left * size_b + right


def shuffle(samples: np.ndarray, *, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What each sample of an endless stream is, if every pass visits all of range(n) in an order of its own.

    Args:
        samples: Global sample indices, counted from 0 over all passes, shape (m,), int64.
        n: How many there are to visit.
        seed: Any whole number; another seed is another order.

    Returns:
        Numbers in range(n), shape (m,), int64; and the keys of the passes, uint64, of shape (m,), or (1,) where all
        samples are of one pass.
    """
    passes, numbers = np.divmod(np.asarray(samples, dtype=np.int64), n)
    if passes.size and passes[0] == passes[-1] and (passes == passes[0]).all():
        passes = passes[:1]  # one key for all is cheaper than a key for each
    keys = _hash(_hash(passes.astype(np.uint64), 1) ^ _hash(np.array([seed & _MASK], dtype=np.uint64), 2), 3)
    return permute(numbers, n=n, key=keys), keys


class Stream(Protocol):
    """An endless stream of training samples, each a pure function of its global index.

    Attributes:
        n_windows: Samples per pass.
    """

    n_windows: int

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Batches of given samples.

        Args:
            samples: Global sample indices, shape (n_batches, B), int64.

        Yields:
            (idx, targets), each (B, T) int64, one for each row of `samples`.
        """
        ...


class TokenStream:
    """Which window of the corpus each training sample is.

    The corpus is cut into windows of `block_size` inputs; a pass visits every window once, in an order of its own.
    Where there is enough text one window is left out and each pass cuts at another offset, so that over the passes
    a token is seen at every place in a window.

    Args:
        opener: Called for the tokens, shape (n_tokens,), whenever a fresh memory map is wanted; picklable.
        n_tokens: How many tokens that is.
        block_size: Inputs per sample.
        seed: Any whole number; another seed is another order.

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
        """Where samples begin in the corpus: a pure function of the seed and the global sample indices.

        Args:
            samples: Global sample indices, counted from 0 over all passes, shape (m,), int64.

        Returns:
            Positions of the first input token, shape (m,), int64.
        """
        windows, keys = shuffle(samples, n=self.n_windows, seed=self.seed)
        offsets = (_hash(keys, _ROUNDS + 1) % np.uint64(self._slack + 1)).astype(np.int64)
        return offsets + self.block_size * windows

    def batches(self, samples: np.ndarray) -> Iterator[Batch]:
        """Batches of given samples, gathered from a fresh memory map: see `Stream`."""
        windows = window_view(self.opener(), self.block_size)
        for starts in self.starts(samples.ravel()).reshape(samples.shape):
            yield gather_windows(windows, starts)


def window_view(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """Every window of block_size + 1 tokens, shape (n_tokens - block_size, block_size + 1), without a copy."""
    plain = tokens.view(np.ndarray)  # a memmap runs slow Python code each time it is indexed
    return np.lib.stride_tricks.sliding_window_view(plain, block_size + 1)


def gather_windows(windows: np.ndarray, starts: np.ndarray) -> Batch:
    """A batch from a `window_view`: see `gather`."""
    picked = windows[starts]  # (B, T + 1)
    batch = np.empty((2, len(starts), picked.shape[1] - 1), dtype=np.int64)
    batch[0] = picked[:, :-1]
    batch[1] = picked[:, 1:]
    idx, targets = torch.from_numpy(batch).unbind(0)  # contiguous both, for models that call .view(-1)
    return idx, targets


def gather(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> Batch:
    """Inputs and targets of some windows, copied straight from the tokens.

    Args:
        tokens: The corpus, shape (n_tokens,), usually a memory map.
        starts: Positions of the first inputs, shape (B,).
        block_size: Inputs per sample, T.

    Returns:
        idx and targets, each (B, T) int64 and contiguous; targets are the inputs moved on by one token.
    """
    return gather_windows(window_view(tokens, block_size), starts)


class TrainBatches(IterableDataset[Batch]):
    """The endless training batches of one rank, for DataLoader(..., batch_size=None).

    Micro-batch m of rank r holds the samples first_sample + m*B*R + i*R + r for i in range(B). Loader workers take
    micro-batches in turn, so any number of them gives the same order as none.

    Args:
        stream: Where samples come from.
        batch_size: Samples per micro-batch, B.
        rank: Which rank this is, r.
        world_size: How many ranks there are, R.
        first_sample: How many samples all ranks together have consumed already.
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
            # A memory map's pages count as this process's memory until it is dropped: one is opened for each chunk.
            turns = micro_batch + stride * np.arange(_CHUNK_BATCHES)
            yield from self.stream.batches(turns[:, None] * per_batch + rows)  # (batches, B)
            micro_batch += stride * _CHUNK_BATCHES


class EvalPass(IterableDataset[Batch], ABC):
    """One pass over a split from front to back, for DataLoader(..., batch_size=None).

    All ranks yield the same number of equal batches. What is missing to a full batch has idx 0 and target -1, so add up
    losses and counts of targets >= 0 and divide at the end; the mean loss of a batch without any such target is not a
    number.

    Args:
        n_sequences: How many sequences the split has.
        batch_size: Sequences per batch, B.
        rank: Which rank this is; rank r of R takes sequences r, r + R, ...
        world_size: How many ranks there are.
        limit_sequences: Stop after so many sequences, counted over all ranks; None means all.

    Attributes:
        n_sequences: How many sequences all ranks together yield.
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
        """From numbers of sequences, (B,), to (idx, targets), each (B, T) int64; opened anew now and then.

        Numbers from `n_sequences` on are what is missing to a full batch.
        """

    def __len__(self) -> int:
        """Batches per rank, the same on every rank."""
        return -(-self.n_sequences // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield (idx, targets), each (B, T) int64."""
        first, stride = _worker_turn()
        for number in range(first, len(self), stride):
            if number // stride % _CHUNK_BATCHES == 0:
                read = self.open()
            yield read((number * self.batch_size + np.arange(self.batch_size)) * self.world_size + self.rank)


class EvalBatches(EvalPass):
    """One pass over the tokens of a split.

    Sequence w reads from token w*S on and has the targets w*S+1 to w*S+T, the last one as many as are left. The first
    scores all of its targets and the others their last S: every token but the first is scored exactly once, by the
    sequence that gives it the most context.

    Args:
        opener: Called for the tokens, shape (n_tokens,), now and then during a pass; picklable.
        n_tokens: How many tokens that is.
        block_size: Inputs per sequence, T.
        stride: Tokens from the start of a sequence to that of the next, S, from 1 to T; None means T, no overlap.
        batch_size: See EvalPass for this and the further arguments.
        rank: Which rank this is.
        world_size: How many ranks there are.
        limit_sequences: Stop after so many sequences.

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
        """Reads from a fresh memory map."""
        return functools.partial(self._batch, self.opener().view(np.ndarray))

    def _batch(self, tokens: np.ndarray, sequences: np.ndarray) -> Batch:
        columns = np.arange(self.block_size + 1)
        positions = sequences[:, None] * self.stride + columns  # (B, T + 1)
        present = (positions < self.n_tokens) & (sequences < self.n_sequences)[:, None]
        picked = tokens[np.where(present, positions, 0)].astype(np.int64)
        has_target = present[:, 1:]
        is_new = (columns[1:] > self.block_size - self.stride) | (sequences == 0)[:, None]
        idx = np.where(has_target, picked[:, :-1], 0)
        targets = np.where(has_target & is_new, picked[:, 1:], -1)
        return torch.from_numpy(idx), torch.from_numpy(targets)


def _worker_turn() -> tuple[int, int]:
    """This loader worker's first batch and its stride: 0 and 1 in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
