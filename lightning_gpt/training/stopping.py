"""Stop a run on a signal, after a time, or when a rank has died; hand a SLURM job back to its queue."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

from lightning_gpt.config import UserError
from lightning_gpt.training.ranks import Ranks
from lightning_gpt.training.saving import save_last
from lightning_gpt.training.watchdog import EXIT_CODES, REQUEUE, SILENT, Watchdog

# Messages of torch's collectives when another rank is gone.
_LOST_RANK = re.compile("gloo|nccl|connection|peer|socket|broken pipe|store", re.IGNORECASE)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Stopped(Exception):
    """Raised on all ranks at the boundary at which they stop, after the checkpoint is saved."""


class Stopping(Callback):
    """Stop all ranks at the same boundary, and save ``last`` there.

    Boundaries are the ends of optimizer steps and of validation batches. A stop during validation leaves it early,
    without a result.

    Args:
        watch: The run's watchdog.
    """

    def __init__(self, watch: Watchdog) -> None:
        self.watch = watch
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the ranks, whose process group exists by now."""
        if trainer.world_size > 1:
            watch = self.watch
            watch.run_dir = Path(
                trainer.strategy.broadcast(str(watch.run_dir))
            )  # ranks name new folders by their clocks
            watch.ranks = Ranks(
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                agreement=watch.agreement,
                status=watch.heartbeat,
                stopping=watch.learn,
                failed=lambda text, speaks: watch.lose(text, speaks=speaks),
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the end of a step from here on."""
        self._step = trainer.global_step
        self.watch.touch(f"step {self._step + 1}")
        self.watch.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop at the end of a step, which includes its validation and its line in the log."""
        step = trainer.global_step
        if step != self._step:
            self._step = step
            self._boundary(trainer)
        self.watch.touch(f"step {step + 1}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the end of a micro-batch."""
        self.watch.touch(f"the end of step {trainer.global_step}", ends_step=True)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop after a validation batch."""
        if not trainer.sanity_checking:
            self._boundary(trainer)
            self.watch.touch(f"the validation at step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that a checkpoint is being written."""
        self.watch.touch("saving")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the final sample, and end at once from here on, because everything is saved."""
        stops = self.watch.agreement.passes()
        self.watch.finished, self.watch.training = True, False
        self.watch.touch("the final sample")
        if stops or self.watch.reason:
            raise Stopped

    def _boundary(self, trainer: Trainer) -> None:
        if self.watch.agreement.passes():
            save_last(trainer)
            raise Stopped


@contextlib.contextmanager
def stopping_safely(trainer: Trainer, watch: Watchdog, run_dir: Path) -> Iterator[None]:
    """Fit in this context: it turns a stop into a message and an exit code, and ends all ranks when one has failed.

    Raises:
        SystemExit: A signal has stopped the run, or another rank has died.
    """
    _separate_attempts()
    watch.trainer, watch.run_dir = trainer, run_dir
    try:
        with _lightning_disarmed(trainer):
            yield
        _leave_together(watch)
    except Stopped:
        watch.leaving = True
        _leave_together(watch)
        _report(watch, trainer.global_step)
    except (UserError, SystemExit, KeyboardInterrupt):
        watch.leaving = True
        if watch.ranks and watch.finished:
            time.sleep(1.5)  # in which the other ranks learn of it
        raise
    except BaseException as error:
        watch.leaving = True
        _blame(watch, error)
        raise
    finally:
        if watch.ranks:
            watch.ranks.abandon()
        for child in watch.children():
            child.kill()


def duration(text: str) -> float:
    """Return the seconds of a duration such as "90s", "30m", "12h", "2d", "12:00:00", or SLURM's "1-12:00:00".

    Raises:
        UserError: The text is no duration above zero.
    """
    seconds = 0.0
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text):
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = days * 86400 + hours * 3600 + minutes * 60 + rest
    if not seconds:
        raise UserError(f"--max_time {text} is not a duration; give one such as 90s, 30m, 12h or 1-12:00:00")
    return seconds


@contextlib.contextmanager
def _lightning_disarmed(trainer: Trainer) -> Iterator[None]:
    """Turn off what Lightning does about signals and dead ranks.

    Its handlers save and requeue SLURM jobs in their own way, each micro-batch waits for a broadcast between devices,
    and a thread kills all ranks, without a word, up to 5 s after one has ended with an error.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    launch_observer = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = lambda child_processes: None
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = launch_observer


def _separate_attempts() -> None:
    """Give each attempt of torchrun names of its own in the store, which keeps the addresses of dead processes.

    A process that started first would otherwise connect to the other ranks of the attempt before (torch 2.13).
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and not torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._world.group_count = 1000 * attempt


def _leave_together(watch: Watchdog) -> None:
    """Wait for the other ranks, so that none mistakes the end of this one for a failure."""
    watch.closing = True
    if watch.ranks:
        watch.ranks.close(patience=60)
    for child in watch.children():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=30)


def _report(watch: Watchdog, step: int) -> None:
    """Say where the run has stopped; raise SystemExit with the exit code of the reason."""
    assert watch.reason
    code = EXIT_CODES[watch.reason]
    if watch.rank == 0:
        if watch.finished:
            print("stopped after the last step; the run is complete", flush=True)
        else:
            print(f"stopped at step {step}; {watch.how_to_continue()}", flush=True)
        if code == REQUEUE and (job := slurm_job()):
            print(requeue(job), flush=True)
    # The rank that launched this one takes any other exit code for a failure.
    if code:
        raise SystemExit(0 if watch.is_launched else code)


def slurm_job() -> str | None:
    """Return the name by which SLURM can requeue this process's job; None outside of a batch job."""
    job = os.environ.get("SLURM_JOB_ID")
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return job


def requeue(job: str) -> str:
    """Hand a SLURM job back to its queue, and return a line that says whether it worked."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol requeue {job} failed: {error}"
    if done.returncode:
        return f"scontrol requeue {job} failed: {' '.join((done.stderr or done.stdout).split())}"
    return f"requeued SLURM job {job}"


def _blame(watch: Watchdog, error: BaseException) -> None:
    """Find out whether another rank caused an error; raise SystemExit if so, else tell the other ranks."""
    watch.failing = True
    if watch.ranks is None:
        return
    patience = 2 * SILENT if _LOST_RANK.search(str(error)) else 1.0
    deadline = time.monotonic() + patience
    while watch.loss is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if watch.loss is not None:
        raise SystemExit(1) from None
    first_line = str(error).partition("\n")[0]
    text = f"rank {watch.rank} failed with {type(error).__name__}: {first_line}"
    watch.lose(text)
    watch.ranks.fail(text, patience=5)
    if watch.rank == 0:
        time.sleep(1.5)  # it may hold the store, in which the others read this
