"""Learning-rate schedules, as factors on the peak learning rate: a linear warm-up, then one of SHAPES."""

import math
from collections.abc import Callable

# The share of the decay that is left, given the share of its steps that is done, from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "wsd": lambda done: 1 - done,
}


def scheduled(
    step: int,
    *,
    shape: str = "cosine",
    warmup_steps: int,
    decay_steps: int | None,
    cooldown_steps: int | None = None,
    final: float,
) -> float:
    """Return the factor on the peak learning rate at an optimizer step.

    See Loshchilov and Hutter, 2017 (arXiv:1608.03983) for the cosine, here without restarts, and Hu et al., 2024
    (arXiv:2404.06395) for wsd: warm-up, stable, decay.

    Args:
        step: Optimizer step, counted from 0.
        shape: A name in SHAPES.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the decay ends; None stays at the peak after the warm-up.
        cooldown_steps: Length of the decay in steps; None starts it after the warm-up.
        final: Factor at ``decay_steps`` and after it.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay_steps is None:
        return 1.0
    if step >= decay_steps:
        return final
    start = warmup_steps if cooldown_steps is None else max(warmup_steps, decay_steps - cooldown_steps)
    if step < start:
        return 1.0
    progress = (step - start) / max(1, decay_steps - start)
    return final + (1 - final) * SHAPES[shape](progress)
