"""The learning-rate schedule, as a factor on the peak learning rate."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int | None, final: float) -> float:
    """Return the factor on the peak learning rate at an optimizer step: linear warm-up, then half a cosine.

    See Loshchilov and Hutter, 2017 (arXiv:1608.03983), here without restarts.

    Args:
        step: Optimizer step, counted from 0.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the cosine ends; None stays at the peak after the warm-up.
        final: Factor at ``decay_steps`` and after it.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay_steps is None:
        return 1.0
    if step >= decay_steps:
        return final
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
