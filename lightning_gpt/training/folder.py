"""The folder of a run: its name, its lock, and what may be replaced in it."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.atomic import atomic_file, locked, remove
from lightning_gpt.checkpoint import RUNS, CanonicalCheckpoint, canonical_folder
from lightning_gpt.checkpoint.continuing import checkpoints_in
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.launch import restarted
from lightning_gpt.strategies.agreement import holds_for_all
from lightning_gpt.training.samples import SAMPLES
from lightning_gpt.training.summary import CHART, SUMMARY
from lightning_gpt.trust import remember_run

LOCK = ".lock"
_LINGERING_SECONDS = 30  # data loading processes outlive a killed run by seconds, and hold its lock


def fresh_folder() -> Path:
    """Return a folder in ``runs/`` that does not exist, named after the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, count = RUNS / stamp, 1
    while folder.exists():
        count += 1
        folder = RUNS / f"{stamp}-{count}"
    return folder


class SameFolder(Callback):
    """Make all ranks use rank 0's run folder, and check that they resume the same checkpoint.

    The folder is remembered as a run of this machine.

    Attributes:
        run_dir: The run folder; rank 0's once the ranks are connected.
    """

    def __init__(self, run_dir: Path, *, resume: str | None) -> None:
        self.run_dir = run_dir
        self.resume = resume

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with rank 0, when the ranks are connected."""
        folder, resume = trainer.strategy.broadcast((str(self.run_dir), self.resume))
        self.run_dir = Path(folder)
        if trainer.local_rank == 0:  # each machine has a list of its own
            remember_run(self.run_dir)
        # Machines may mount the file system at different paths.
        same = Path(resume or "").parts[-3:] == Path(self.resume or "").parts[-3:]
        if not holds_for_all(same):
            raise UserError(
                f"the ranks found different checkpoints to resume, rank 0 {resume}; give --resume the path of one that"
                " all machines see"
            )


@contextlib.contextmanager
def open_folder(
    run_dir: Path, run: RunOptions, *, record: dict[str, Any], sources: Iterable[Path] = ()
) -> Iterator[None]:
    """Own the run folder for the time of a run, and write its ``config.yaml``; rank 0 only.

    Args:
        run_dir: The run folder; created if needed.
        run: The run's options.
        record: Content of ``config.yaml``.
        sources: Checkpoints that a new run starts from.

    Raises:
        UserError: Another run is writing to the folder, it holds checkpoints that the run would replace, or it cannot
            be written.
    """
    # The first process of a further machine does not know its rank yet if Lightning starts the others.
    if getattr(rank_zero_only, "rank", 0) != 0 or os.environ.get("NODE_RANK", "0") != "0":
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=run.out_dir is not None)
            _lock(run_dir, stack)
            _make_room(run_dir, run, sources=sources)
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            with atomic_file(run_dir / "config.yaml", mode="w") as file:
                yaml.safe_dump(record, file, sort_keys=False)
        except OSError as error:
            raise UserError(f"--out_dir {run_dir} cannot be written: {error.strerror}; choose another") from error
        yield


def _lock(run_dir: Path, stack: contextlib.ExitStack) -> None:
    """Hold the folder's lock until the stack is closed; a restarted run waits for its predecessor's processes."""
    deadline = time.monotonic() + (_LINGERING_SECONDS if restarted() else 0)
    while True:
        try:
            stack.enter_context(locked(run_dir / LOCK, wait=False))
            return
        except TimeoutError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{run_dir} is in use by another run; wait for its end, or choose another --out_dir"
                ) from error
        time.sleep(0.5)


def _make_room(run_dir: Path, run: RunOptions, *, sources: Iterable[Path]) -> None:
    """Remove the old run's files for --overwrite; raise a UserError if its checkpoints would be replaced without it."""
    if run.resume and Path(run.resume).resolve().is_relative_to(run_dir.resolve()):
        return
    if run.overwrite:
        for source in sources:
            if source.resolve().is_relative_to(run_dir.resolve()):
                raise UserError(
                    f"--overwrite would remove {source}, from which this run starts; choose another --out_dir"
                )
        for path in _written_by_runs(run_dir):
            remove(path)
    elif checkpoints_in(run_dir):
        raise UserError(
            f"--out_dir {run_dir} holds the checkpoints of a run; continue it with --resume {run_dir}, replace it with"
            " --overwrite, or choose another folder"
        )


def _written_by_runs(run_dir: Path) -> list[Path]:
    """Return the checkpoints, their converted forms, the logs, samples, summary and chart in a run folder."""
    checkpoints = checkpoints_in(run_dir)
    converted = [folder for folder in map(canonical_folder, checkpoints) if CanonicalCheckpoint.recognises(folder)]
    unfinished = run_dir.glob("checkpoints/*.ckpt.part")
    logged = [*run_dir.glob("logs/version_*"), *run_dir.glob(f"{SAMPLES}/*.txt")]
    return [*checkpoints, *converted, *unfinished, *logged, run_dir / SUMMARY, run_dir / CHART]
