"""Attention to the last tokens only: a mask, or a FlexAttention kernel that skips the blocks of all other keys."""

import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

compiled = functools.cache(torch.compile)  # compiles each function once, on first use


def local_mask(config: Any, positions: torch.Tensor, S: int, dtype: torch.dtype, *, fused: bool) -> Any:
    """Return the `mask` of CausalSelfAttention in layers with a window.

    Args:
        config: The model's GPTConfig.
        positions: Positions of the queries, (T,) or (B, 1).
        S: Number of keys.
        dtype: Dtype of the attention.
        fused: Whether FlexAttention, which has no dropout, may be used.

    Returns:
        Keys to attend to, bool (T, S) or (B, 1, 1, S); or a function (q, k, v, enable_gqa) -> attention output.
    """
    # FlexAttention has no float64, needs heads of at least 16, and is slow unless S fills its blocks of 128 keys.
    fits = positions.is_cuda and dtype.itemsize < 8 and config.n_embd // config.n_head >= 16 and S % 128 == 0
    if fused and fits:
        return flex_window(config.window, S, positions.device)
    return window_mask(positions, S, config.window)


def window_mask(positions: torch.Tensor, S: int, window: int) -> torch.Tensor:
    """Return a mask of the S keys that the queries at positions (T,) or (B, 1) attend to: the last `window`.

    Returns:
        Bool (T, S) or (B, 1, 1, S).
    """
    distance = positions[..., None] - torch.arange(S, device=positions.device)
    mask = (distance >= 0) & (distance < window)
    return mask if positions.dim() == 1 else mask[:, None]


@functools.lru_cache(maxsize=8)
def flex_window(window: int, T: int, device: torch.device) -> functools.partial:
    """Return attention of T queries to the last `window` of T keys, as a kernel that stores no mask (T, T)."""

    def attends(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < window)

    with torch.inference_mode(False):  # training uses what a validation may have cached
        blocks = create_block_mask(attends, None, None, T, T, device=device)
    return functools.partial(compiled(flex_attention), block_mask=blocks)
