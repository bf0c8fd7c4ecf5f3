"""The folder of a run: its name, its lock, and the configuration saved in it."""

from datetime import datetime
from pathlib import Path

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.checkpoint import RUNS, remember_run
from lightning_gpt.config import TrainConfig, UserError


def fresh_folder() -> Path:
    """Return a folder in ``runs/`` that does not exist, named after the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, count = RUNS / stamp, 1
    while folder.exists():
        count += 1
        folder = RUNS / f"{stamp}-{count}"
    return folder


@rank_zero_only
def open_folder(run_dir: Path, config: TrainConfig) -> None:
    """Create the run folder and save the configuration in it, without one-off flags."""
    flat = config.flat() | {"out_dir": str(run_dir), "resume": None, "trust_checkpoint": False, "tokenizer_file": None}
    try:
        run_dir.mkdir(parents=True, exist_ok=config.run.out_dir is not None)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(flat, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out_dir {run_dir} cannot be written: {error.strerror}; choose another") from error
    remember_run(run_dir)
