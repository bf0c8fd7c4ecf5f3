"""ALiBi, attention with linear biases: scores fall with the distance between tokens (Press et al. 2022)."""

import functools
import math
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

compiled = functools.cache(torch.compile)  # compiles each function once, on first use


def alibi_mask(config: Any, pos: torch.Tensor, S: int, dtype: torch.dtype, *, fused: bool) -> Any:
    """Return the `mask` of CausalSelfAttention: a bias of the scores, or a FlexAttention kernel that adds it.

    Args:
        config: The model's GPTConfig.
        pos: Positions of the queries, (T,) or (B, T).
        S: Number of keys.
        dtype: Dtype of the attention.
        fused: Whether FlexAttention, which has no dropout, may be used.

    Returns:
        A causal bias (1 or B, n_head, T, S) in `dtype`; or a function (q, k, v) -> attention output.
    """
    # FlexAttention has no float64, needs heads of at least 16, and is slow unless S fills its blocks of 128 keys.
    fits = pos.is_cuda and dtype.itemsize < 8 and config.n_embd // config.n_head >= 16 and S % 128 == 0
    if fused and fits:
        return flex_alibi(config.n_head, S, pos.device)
    return alibi_bias(alibi_slopes(config.n_head, pos.device), pos, S).to(dtype)


def alibi_slopes(n_head: int, device: torch.device | None = None) -> torch.Tensor:
    """Return each head's slope (n_head,): how much its scores fall per token of distance."""
    n = 2 ** (n_head.bit_length() - 1)
    # If n_head is not a power of two, the slopes of n heads are followed by every other slope of 2n heads.
    head = torch.arange(1, n_head + 1, dtype=torch.float32, device=device)
    return torch.exp2(torch.where(head > n, head - n - 0.5, head) * (-8 / n))


def alibi_bias(slopes: torch.Tensor, pos: torch.Tensor, S: int) -> torch.Tensor:
    """Return the causal bias of the scores of queries at pos, (T,) or (B, T), with S keys: (1 or B, n_head, T, S)."""
    distance = (pos[..., None] - torch.arange(S, device=pos.device)).view(-1, 1, pos.size(-1), S)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)


@functools.lru_cache(maxsize=8)
def flex_alibi(n_head: int, T: int, device: torch.device) -> functools.partial:
    """Return causal ALiBi attention of q, k and v (B, n_head, T, head_size), as a kernel that stores no bias."""

    def add_bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + slopes[h] * (j - i)

    with torch.inference_mode(False):  # training uses what a validation may have cached
        slopes = alibi_slopes(n_head, device)
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    return functools.partial(compiled(flex_attention), score_mod=add_bias, block_mask=blocks)
