"""Print what is about to run: model, data, budget and devices."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.checkpoint import Checkpoint
from lightning_gpt.config import SIZES, Resumed
from lightning_gpt.data.loading import Source
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.training.budget import Budget
from lightning_gpt.training.record import changed_options

_INDENT = 10


@rank_zero_only
def print_header(
    module: GPTModule,
    source: Source,
    budget: Budget,
    *,
    loaded: Sequence[str],
    where: Devices,
    strategy: str,
    schedule: str,
) -> None:
    """Print what is about to run.

    Args:
        module: The module to train.
        source: Source of the samples: token files or a task.
        budget: Length and batch size of the run.
        loaded: Lines that describe the initial weights.
        where: The devices.
        strategy: Description of the strategy.
        schedule: Description of the learning-rate schedule; empty for the default one.
    """
    parameters = sum(p.numel() for p in module.parameters())
    fields = module.model_config
    named = f"{module.implementation.name} {'/'.join(str(fields[s]) for s in SIZES if s in fields)}".strip()
    derived = ", from --global_batch_tokens" if budget.global_batch_tokens is not None else ""
    lines = [
        *loaded,
        f"model     {named}, block {budget.block_size}, {parameters:,} parameters",
        f"data      {source.describe()}, vocabulary {source.vocab_size:,}",
        f"steps     {budget.max_steps:,} of {budget.tokens_per_step:,} tokens ({budget.batch_size} x"
        f" {budget.block_size} x {budget.accumulate} micro-batches x {budget.world_size} devices{derived})",
        *([f"schedule  {schedule}"] if schedule else []),
        f"strategy  {strategy}, {where.precision}, {where.accelerator}",
    ]
    print("\n".join(map(_wrapped, lines)))


def _wrapped(line: str) -> str:
    """Break a line between words where it would leave the terminal; elsewhere return it whole."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    # Whole words only, and the gap after the first word as it is.
    name, value = line[:_INDENT], line[_INDENT:]
    first, *rest = textwrap.wrap(value, width - _INDENT, **options) or [""]
    return "\n".join([name + first, *(" " * _INDENT + part for part in rest)])


def describe_resumed(
    checkpoint: Checkpoint, run_dir: Path, *, record: dict[str, Any], resumed: Resumed | None, branches: bool
) -> list[str]:
    """Return lines that say what is resumed, and which options differ from the saved ones.

    Args:
        checkpoint: The checkpoint.
        run_dir: The run folder.
        record: Content of the new ``config.yaml``.
        resumed: How the run came to be resumed.
        branches: Whether it is a new run that branches from the checkpoint's.
    """
    inside = checkpoint.path.parent == (run_dir / "checkpoints").resolve()
    verb = "branching from" if branches else "resuming"
    lines = [f"{verb} {run_dir if inside else checkpoint.path} at step {checkpoint.step}"]
    changed = changed_options(record, (resumed.saved if resumed else {}) | checkpoint.model_config)
    return [*lines, f"changed   {', '.join(changed)}"] if changed else lines


@rank_zero_only
def print_finished(checkpoint: Checkpoint, budget: Budget) -> None:
    """Print that a checkpoint has already reached the end of the budget."""
    print(f"finished  {checkpoint.path} is at step {checkpoint.step} of {budget.max_steps}; nothing to do")
