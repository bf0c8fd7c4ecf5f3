"""A whole corpus to token ids, on all processor cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lightning_gpt.tokenizers import Tokenizer

PIECE_BYTES = 1 << 20


def encode_corpus(tokenizer: Tokenizer, data: bytes, *, source: str, piece_bytes: int = PIECE_BYTES) -> np.ndarray:
    """Token ids of a corpus, shape (n_tokens,), in whatever unsigned type the tokenizer gives.

    Args:
        tokenizer: What encodes. One that cannot cut a text gets it in one piece.
        data: The corpus as it lies in its file.
        source: What to call the corpus in an error message.
        piece_bytes: About how much one thread takes at a time. It does not change the tokens.

    Raises:
        UserError: The corpus does not suit the tokenizer.
    """
    from tqdm import tqdm

    threads = os.cpu_count() or 1
    parts: list[np.ndarray] = []
    bar = tqdm(total=len(data), desc="tokenizing", unit="B", unit_scale=True, delay=2, disable=None)
    with bar, ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()

        def take() -> None:
            size, tokens = waiting.popleft()
            parts.append(tokens.result())
            bar.update(size)

        try:
            for start, end in _pieces(tokenizer, data, piece_bytes):
                tokens = pool.submit(tokenizer.encode_bytes, data[start:end], source=source, offset=start)
                waiting.append((end - start, tokens))
                if len(waiting) > 2 * threads:  # pieces are copies: not all of them at once
                    take()
            while waiting:
                take()
        finally:
            pool.shutdown(cancel_futures=True)
    return np.concatenate(parts)


def _pieces(tokenizer: Tokenizer, data: bytes, size: int) -> Iterator[tuple[int, int]]:
    start, end = 0, None
    while end != len(data):
        end = tokenizer.cut(data, start + size) or len(data)
        yield start, end
        start = end
