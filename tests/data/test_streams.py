"""Streams: the training order does not depend on ranks, workers or resuming; evaluation scores each token once."""

import functools
import itertools
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_gpt.data.streams import EvalBatches, TokenStream, TrainBatches, gather, permute


def _opener(n_tokens: int):
    return functools.partial(np.arange, n_tokens, dtype=np.uint32)


def _never() -> np.ndarray:
    raise AssertionError("the order must not read tokens")


def _stream(n_tokens: int = 1000, block_size: int = 8, seed: int = 3) -> TokenStream:
    return TokenStream(_opener(n_tokens), n_tokens=n_tokens, block_size=block_size, seed=seed)


def _first_tokens(batches, count: int) -> list[list[int]]:
    return [idx[:, 0].tolist() for idx, _ in itertools.islice(batches, count)]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    permuted = permute(np.arange(n), n=n, key=key)
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(n))


@pytest.mark.parametrize("n", [*range(1, 70), 2**16 - 1, 2**16, 2**16 + 1, 999_983])
def test_permutation_is_a_bijection_at_edge_sizes(n: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n=n, key=7)), np.arange(n))


@given(st.integers(10**9, 2**62), st.integers(0, 2**63), st.data())
@settings(deadline=None)
def test_permutation_of_a_huge_range_is_injective(n: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    permuted = permute(index, n=n, key=key)
    assert permuted.min() >= 0 and permuted.max() < n
    assert len(set(permuted.tolist())) == len(index)
    one_by_one = [permute(index[i : i + 1], n=n, key=key)[0] for i in range(len(index))]
    assert permuted.tolist() == one_by_one
    keys = np.full(len(index), key, dtype=np.uint64)
    assert permute(index, n=n, key=keys).tolist() == one_by_one


@pytest.mark.parametrize("n", [1009, 10_000, 10**12])
def test_permutation_looks_random(n: int) -> None:
    m = min(n, 10_000)
    index = np.arange(m)
    permuted = permute(index, n=n, key=1)
    assert np.mean(np.abs(np.diff(permuted)) == 1) < 0.01
    assert np.mean(permuted == index) < 0.01
    assert abs(np.corrcoef(index, permuted)[0, 1]) < 0.1
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.1
    deciles = np.bincount(permuted * 10 // n, minlength=10) / m
    assert np.all(np.abs(deciles - 0.1) < 0.015)
    assert np.mean(permute(index, n=n, key=2) == permuted) < 0.01


def test_permutations_of_four_are_equally_likely() -> None:
    keys = np.arange(24_000, dtype=np.uint64)
    columns = [permute(np.full(len(keys), i), n=4, key=keys) for i in range(4)]
    counts = Counter(zip(*(column.tolist() for column in columns), strict=True))
    assert len(counts) == 24
    assert max(counts.values()) < 1.25 * 1000 and min(counts.values()) > 0.75 * 1000


def test_permutation_refuses_indices_outside_its_range() -> None:
    for index in (-1, 5):
        with pytest.raises(ValueError, match="outside range"):
            permute(np.array([index]), n=5, key=0)
    with pytest.raises(ValueError, match="n is 0"):
        permute(np.array([0]), n=0, key=0)
    assert permute(np.array([], dtype=np.int64), n=5, key=0).shape == (0,)


@given(st.integers(1, 20), st.integers(1, 400), st.integers(-(2**40), 2**70))
@settings(deadline=None)
def test_pass_visits_every_window_once(block_size: int, extra: int, seed: int) -> None:
    n_tokens = block_size + extra
    stream = TokenStream(_never, n_tokens=n_tokens, block_size=block_size, seed=seed)
    n = stream.n_windows
    assert n >= 1
    assert n_tokens - 1 - n * block_size < 2 * block_size  # at most one window is left out
    starts = stream.starts(np.arange(4 * n))
    assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
    for number in range(4):
        one = np.sort(starts[number * n : (number + 1) * n])
        assert np.all(np.diff(one) == block_size)
        assert np.array_equal(stream.starts(np.arange(number * n, (number + 1) * n)), starts[number * n :][:n])


def test_passes_and_seeds_differ() -> None:
    stream, other = _stream(), _stream(seed=4)
    n = stream.n_windows
    passes = stream.starts(np.arange(50 * n)).reshape(50, n)
    assert set((passes[:, 0] % 8).tolist()) == set(range(8))  # passes begin at every offset
    orders = {tuple(np.argsort(one).tolist()) for one in passes}
    assert len(orders) == 50
    assert not np.array_equal(other.starts(np.arange(n)), passes[0])


def test_stream_of_a_trillion_tokens_takes_constant_memory() -> None:
    stream = TokenStream(_never, n_tokens=10**12, block_size=1024, seed=1)
    assert stream.n_windows == (10**12 - 1) // 1024 - 1
    tracemalloc.start()
    starts = stream.starts(np.arange(500_000_000, 500_010_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert len(np.unique(starts)) == 10_000
    assert starts.min() >= 0 and starts.max() + 1025 <= 10**12
    assert starts.max() > 9 * 10**11


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        _stream(n_tokens=8, block_size=8)
    assert _stream(n_tokens=9, block_size=8).starts(np.arange(5)).tolist() == [0] * 5
    with pytest.raises(ValueError, match="too few"):
        EvalBatches(_never, n_tokens=1, block_size=8, batch_size=2)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_gather_returns_shifted_windows(tmp_path, dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 500).astype(dtype)
    tokens.tofile(tmp_path / "x.bin")
    starts = np.array([0, 17, 500 - 9])
    idx, targets = gather(np.memmap(tmp_path / "x.bin", dtype=dtype, mode="r"), starts, 8)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.is_contiguous() and targets.is_contiguous()
    for row, start in enumerate(starts):
        assert idx[row].tolist() == tokens[start : start + 8].tolist()
        assert targets[row].tolist() == tokens[start + 1 : start + 9].tolist()


@given(
    st.integers(0, 500),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 6),
)
@settings(deadline=None, max_examples=40)
def test_samples_are_independent_of_ranks_batch_size_and_resuming(
    first: int, batch_size: int, world_size: int, steps: int
) -> None:
    stream = _stream()
    expected = stream.starts(first + np.arange(steps * batch_size * world_size)).tolist()
    per_rank = [
        _first_tokens(
            TrainBatches(stream, batch_size=batch_size, rank=rank, world_size=world_size, first_sample=first), steps
        )
        for rank in range(world_size)
    ]
    seen = [
        per_rank[rank][step][row] for step in range(steps) for row in range(batch_size) for rank in range(world_size)
    ]
    assert seen == expected


def test_pass_resumed_on_three_ranks_visits_every_window_once() -> None:
    stream = _stream()
    n = stream.n_windows  # 123
    seen = np.concatenate(_first_tokens(TrainBatches(stream, batch_size=6), 10)).tolist()
    for rank in range(3):
        resumed = TrainBatches(stream, batch_size=7, rank=rank, world_size=3, first_sample=60)
        seen += np.concatenate(_first_tokens(resumed, 3)).tolist()
    assert len(seen) == n == len(set(seen))


def test_batches_continue_across_chunks() -> None:
    stream = _stream()
    firsts = np.concatenate(_first_tokens(TrainBatches(stream, batch_size=2), 600))
    assert np.array_equal(firsts, stream.starts(np.arange(1200)))


def test_order_is_independent_of_loader_workers() -> None:
    dataset = TrainBatches(_stream(), batch_size=3, rank=1, world_size=2, first_sample=5)
    evaluation = EvalBatches(_opener(100), n_tokens=100, block_size=8, batch_size=2)
    plain = list(itertools.islice(DataLoader(dataset, batch_size=None), 12))
    plain_evaluation = list(DataLoader(evaluation, batch_size=None))
    worked = list(itertools.islice(DataLoader(dataset, batch_size=None, num_workers=2), 12))
    worked_evaluation = list(DataLoader(evaluation, batch_size=None, num_workers=2))
    assert len(plain_evaluation) == len(worked_evaluation) == len(evaluation)
    for one, other in zip(plain + plain_evaluation, worked + worked_evaluation, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_datasets_can_be_pickled() -> None:
    train = pickle.loads(pickle.dumps(TrainBatches(_stream(), batch_size=3)))
    assert next(iter(train))[0].shape == (3, 8)
    evaluation = EvalBatches(_opener(100), n_tokens=100, block_size=8, batch_size=2)
    assert next(iter(pickle.loads(pickle.dumps(evaluation))))[0].shape == (2, 8)


@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None)
def test_evaluation_scores_every_token_once(n_tokens: int, block_size: int, batch_size: int, world_size: int) -> None:
    scored: list[int] = []
    for rank in range(world_size):
        batches = EvalBatches(
            _opener(n_tokens),
            n_tokens=n_tokens,
            block_size=block_size,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        count = 0
        for idx, targets in batches:
            count += 1
            assert idx.shape == targets.shape == (batch_size, block_size)
            assert idx.dtype == targets.dtype == torch.int64
            assert torch.equal(idx[targets >= 0] + 1, targets[targets >= 0])  # the tokens count up
            assert torch.all(idx[targets < 0] == 0)
            scored += targets[targets >= 0].tolist()
        assert count == len(batches)
    assert sorted(scored) == list(range(1, n_tokens))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_limit_counts_over_all_ranks(world_size: int) -> None:
    scored: list[int] = []
    for rank in range(world_size):
        batches = EvalBatches(
            _opener(100),
            n_tokens=100,
            block_size=8,
            batch_size=2,
            rank=rank,
            world_size=world_size,
            limit_sequences=5,
        )
        scored += [token for _, targets in batches for token in targets.flatten().tolist() if token >= 0]
        assert len(batches) == -(-5 // (2 * world_size))
    assert sorted(scored) == list(range(1, 41))
