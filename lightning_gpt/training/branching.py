"""Branch a stable run of the wsd schedule into its cool-down (``--decay_from``).

The branch resumes a checkpoint that the run saved at its peak learning rate. Before the cool-down the learning rate
does not depend on the length of the run, so the branch equals a run that was planned with this length from its start.
"""

from dataclasses import replace
from typing import Any

from lightning_gpt.checkpoint import Checkpoint
from lightning_gpt.config import EXCLUSIVE, TrainConfig, UserError
from lightning_gpt.training.budget import cooldown_length, decay_fraction

SCHEDULE = "wsd"


def branched(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Return the config of a branch: the run's warm-up, and a length such that the cool-down begins now.

    A budget, an end of the schedule or a warm-up that the user gave stays.

    Raises:
        UserError: The checkpoint's run has no stable part, or has already left it, or the fraction leaves no part.
    """
    name, optim, trainer = config.run.decay_from, config.optim, config.trainer
    warmup, began = _stable_part(checkpoint, name=str(name))
    if optim.schedule != SCHEDULE:
        raise UserError(f"--schedule {optim.schedule}: --decay_from {name} cools down under {SCHEDULE}; leave it out")
    step = checkpoint.step
    if step > began:
        raise UserError(
            f"--decay_from {name}: step {step} is in the cool-down, which began at step {began}; give an earlier"
            " checkpoint, such as those that --keep keeps"
        )
    if optim.warmup_steps is None:
        optim = replace(optim, warmup_steps=warmup)
    if optim.lr_decay_steps is None and all(getattr(trainer, option) is None for option in EXCLUSIVE[0]):
        trainer = replace(trainer, max_steps=_length(step, fraction=decay_fraction(optim)))
    return replace(config, optim=optim, trainer=trainer)


def require_stable(config: TrainConfig, checkpoint: Checkpoint, *, cooldown_steps: int) -> None:
    """Check that a branch's cool-down begins at the checkpoint's step or later.

    Args:
        config: The branch, with every default resolved.
        checkpoint: The checkpoint that it continues.
        cooldown_steps: Length of the cool-down in steps.

    Raises:
        UserError: The learning rate would already have fallen.
    """
    end = config.optim.lr_decay_steps
    assert end is not None
    if end - cooldown_steps < checkpoint.step:
        raise UserError(
            f"--decay_from {config.run.decay_from}: a cool-down over the last {config.optim.decay_fraction:g} of"
            f" {end} steps begins at step {end - cooldown_steps}, and the checkpoint is at step {checkpoint.step}; give"
            " more steps, or no budget to begin at that step"
        )


def _stable_part(checkpoint: Checkpoint, *, name: str) -> tuple[int, int]:
    """Return the steps of the warm-up of the checkpoint's run, and the step at which its cool-down begins."""
    trained: dict[str, Any] = checkpoint.header["hyper_parameters"]
    schedule = trained.get("schedule")
    if schedule != SCHEDULE:
        named = f"--schedule {schedule[:20]}" if isinstance(schedule, str) else "an unknown schedule"
        raise UserError(f"--decay_from {name}: it was trained with {named}; give a run of --schedule {SCHEDULE}")
    warmup, end, cooldown = (trained.get(key) for key in ("warmup_steps", "decay_steps", "cooldown_steps"))
    if not (type(warmup) is type(end) is type(cooldown) is int):
        raise UserError(f"--decay_from {name}: it does not say how its schedule went; give a run that train.py made")
    return warmup, max(warmup, end - cooldown)


def _length(step: int, *, fraction: float) -> int:
    """Return the smallest number of steps whose cool-down begins at `step` or later, and is not empty."""
    if not 0 < fraction < 1:
        raise UserError(f"--decay_fraction {fraction:g} leaves no stable or no decaying part; give one between 0 and 1")
    steps = max(1, int((step - 1) / (1 - fraction)))  # too few; each further one moves the beginning by 0 or 1
    while not (cooldown := cooldown_length(steps, fraction=fraction)) or steps - cooldown < step:
        steps += 1
    return steps
