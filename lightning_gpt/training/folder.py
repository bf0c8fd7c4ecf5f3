"""The folder of a run: its name, its lock, and the configuration saved in it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.atomic import atomic_file
from lightning_gpt.checkpoint import RUNS, remember_run
from lightning_gpt.config import PROVENANCE, TrainConfig, UserError
from lightning_gpt.launch import launches


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
        if resume != self.resume:
            raise UserError(
                f"rank {trainer.global_rank} would resume {self.resume} and rank 0 {resume}; give --resume the path of"
                " a checkpoint that all machines see"
            )


@rank_zero_only
def open_folder(run_dir: Path, config: TrainConfig, *, step: int) -> None:
    """Create the run folder and save the configuration in it, without one-off flags.

    Args:
        run_dir: The run folder.
        config: The run.
        step: Optimizer step at which it starts.
    """
    flat = config.flat() | {"out_dir": None, "resume": None, "trust_checkpoint": False, "tokenizer_file": None}
    flat[PROVENANCE] = {"sessions": _sessions(config, step=step)}
    try:
        run_dir.mkdir(parents=True, exist_ok=config.run.out_dir is not None)
        with atomic_file(run_dir / "config.yaml", mode="w") as file:
            yaml.safe_dump(flat, file, sort_keys=False)
    except OSError as error:
        raise UserError(f"--out_dir {run_dir} cannot be written: {error.strerror}; choose another") from error
    remember_run(run_dir)


def _sessions(config: TrainConfig, *, step: int) -> list[dict[str, Any]]:
    """Return what was called when to train this run, the present call last."""
    earlier: list[dict[str, Any]] = []
    if config.resumed:
        provenance = config.resumed.saved.get(PROVENANCE)
        earlier = provenance.get("sessions", []) if isinstance(provenance, dict) else []
    now = datetime.now(UTC).isoformat()
    return [*earlier, {"time": now, "step": step, "command": config.command, "launches": list(launches())}]
