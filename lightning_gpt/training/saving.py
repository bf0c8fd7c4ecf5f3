"""Which checkpoints a run writes and when, and what happens if one cannot be written."""

import math
import re
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_gpt.atomic import remove
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.invocation import command_line
from lightning_gpt.strategies.agreement import agreed, holds_for_all
from lightning_gpt.strategies.saving import copy_checkpoint
from lightning_gpt.training.callbacks import warn

MONITOR = "val_loss"
ON_SAVE_ERROR = ("stop", "continue")


def save_last(trainer: Trainer) -> Path:
    """Save ``last`` now, unless this step is saved already; call this on all ranks at an optimizer-step boundary.

    Returns:
        The path of ``last``.

    Raises:
        UserError: It cannot be written, and ``--on_save_error`` is stop.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = next(callback for callback in callbacks if isinstance(callback, Checkpoints))
    checkpoints.save(trainer)
    return checkpoints.path("last")


class Checkpoints(CheckpointCallback):
    """Save ``last`` at every validation, ``best`` at the lowest validation loss, and what the flags add.

    Names of one step share their files by hard links. ``best`` is written before ``last``: a run that is killed in
    between resumes from the older ``last`` and finds the same best again.

    Args:
        folder: The folder of the checkpoints.
        save_interval: Optimizer steps between saves of ``last`` in addition to those at validations; None for none.
        keep: Number of the newest saves to keep as ``step-NNNNNN``, besides ``best`` and ``last``.
        on_error: "stop", or "continue" to warn and try again at the next save.
        resumes: Whether the run continues another; the best checkpoint in the folder then stays until a better one.
        best_loss: Validation loss that another program's run has reached; ``best`` is written below it.

    Raises:
        UserError: `on_error` is unknown.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_interval: int | None = None,
        keep: int = 0,
        on_error: str = ON_SAVE_ERROR[0],
        resumes: bool = False,
        best_loss: float = math.inf,
    ) -> None:
        if on_error not in ON_SAVE_ERROR:
            raise UserError(f"--on_save_error {on_error} is unknown; choose one of {', '.join(ON_SAVE_ERROR)}")
        self.folder = folder
        self.save_interval = save_interval
        self.keep = keep
        self.goes_on = on_error == "continue"
        self.resumes = resumes
        self.best_loss = best_loss
        self._validated = (-1, math.inf)  # step and loss of the last validation
        self._tried = self._saved = -1  # step of the last attempt to save, and of the content of last
        self._failed = False  # the last attempt

    def path(self, name: str) -> Path:
        """Return the path of a checkpoint."""
        return self.folder / f"{name}.ckpt"

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(monitor=MONITOR)

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest validation loss so far, under the name that Lightning's ModelCheckpoint uses."""
        return {"best_model_score": self.best_loss if math.isfinite(self.best_loss) else None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the loss of the best checkpoint that is in the folder."""
        self._tried = trainer.global_step
        if self.resumes:
            self.best_loss = min(self.best_loss, _loss_of_best(self.path("best")))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save every ``save_interval`` steps: after the validation of the same step, which then has saved already."""
        step = trainer.global_step
        if self.save_interval and step % self.save_interval == 0 and step != self._tried:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation in training."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = trainer.global_step, float(trainer.callback_metrics.get(MONITOR, math.inf))
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try again if the last save failed, because there is no later one."""
        if self._failed:
            self.goes_on = False
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save this step, unless it is saved already; called on all ranks.

        Raises:
            UserError: A rank could not write, and the run stops on errors.
        """
        step, before = trainer.global_step, self.best_loss
        validated, loss = self._validated
        # Ranks may round the loss differently.
        improved = holds_for_all(validated == step and loss < before)
        if self._saved == step and not improved:
            return
        self._tried = step
        if improved:
            self.best_loss = loss
        if trainer.is_global_zero:  # the log of a run that resumes from this checkpoint has no gap
            for logger in trainer.loggers:
                logger.save()
        first, *others = [self.path(name) for name in (["best"] if improved else []) + ["last"] + self._kept(step)]
        try:
            with agreed():
                if trainer.is_global_zero and not self.folder.is_dir():
                    # Not created again: the folder may be on a disk that is not mounted now.
                    raise FileNotFoundError(None, "the folder no longer exists", str(self.folder))
            with agreed():
                self._write(trainer, first)
            before = self.best_loss  # the new best is complete
            with agreed():
                if trainer.is_global_zero:
                    for other in others:
                        copy_checkpoint(first, other)
                    self._prune(step)
        except OSError as error:
            self.best_loss, self._failed = before, True
            self._report(trainer, error, path=first)
        else:
            self._saved, self._failed = step, False

    def _write(self, trainer: Trainer, path: Path) -> None:
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError):
            trainer.strategy.barrier()  # the one at the end of save_checkpoint, where other ranks wait
            raise

    def _kept(self, step: int) -> list[str]:
        return [f"step-{step:06d}"] if self.keep else []

    def _prune(self, step: int) -> None:
        """Delete older checkpoints than the newest ones; later steps, from before a resumption, are not counted."""
        if not self.keep:
            return
        numbers = {path: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in self.folder.iterdir()}
        found = sorted((int(match[1]), path) for path, match in numbers.items() if match and int(match[1]) <= step)
        for _, path in found[: -self.keep]:
            remove(path)

    def _report(self, trainer: Trainer, error: OSError, *, path: Path) -> None:
        """Warn that a save failed, or stop the run."""
        reason = f"{error.filename or path}: {error.strerror or error}"
        what = f"saving step {trainer.global_step} failed: {reason}"
        if not self.goes_on:
            kept = [path for path in map(self.path, ("last", "best")) if path.exists()]
            advice = f"to continue from an earlier step: {command_line('train', f'--resume {self.folder.parent}')}"
            raise UserError(f"{what}; {advice if kept else 'no earlier checkpoint is left'}") from error
        if trainer.is_global_zero:
            warn(f"{what}; training goes on, and the next save tries again")


def _loss_of_best(path: Path) -> float:
    """Return the validation loss of a best checkpoint; infinity if there is none, so that the next one replaces it."""
    for found in (path, path.with_name(f"{path.name}.old")):  # .old after a kill while a folder is replaced
        if found.exists():
            try:
                return open_checkpoint(found).best_loss
            except UserError:  # damaged
                return math.inf
    return math.inf
