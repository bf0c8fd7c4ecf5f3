"""ALiBi, attention with linear biases: the further back a token is, the lower its score (Press et al. 2022)."""

import functools
import math
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

compiled = functools.cache(torch.compile)  # of each function once, when it is first needed


def alibi_slopes(n_head: int, device: torch.device | None = None) -> torch.Tensor:
    """Return by how much each head's scores fall with each token's distance (n_head,): Press et al. 2022, as coded."""
    n = 2 ** (n_head.bit_length() - 1)
    # Where n_head is no power of two, every other slope of 2 n heads follows those of n.
    head = torch.arange(1, n_head + 1, dtype=torch.float32, device=device)
    return torch.exp2(torch.where(head > n, head - n - 0.5, head) * (-8 / n))


def alibi_bias(slopes: torch.Tensor, pos: torch.Tensor, S: int) -> torch.Tensor:
    """Return what is added to the scores of queries at pos, (T,) or (B, T), with S keys: (1 or B, n_head, T, S)."""
    distance = (pos[..., None] - torch.arange(S, device=pos.device)).view(-1, 1, pos.size(-1), S)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)


def flex_alibi(slopes: torch.Tensor, T: int) -> functools.partial:
    """Return causal attention with ALiBi, of q, k and v (B, n_head, T, head_size), as a kernel that needs no bias."""

    def fall(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + slopes[h] * (j - i)

    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=slopes.device)
    return functools.partial(compiled(flex_attention), score_mod=fall, block_mask=blocks)
