"""Write the checkpoints of a run."""

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def save_last(trainer: Trainer) -> Path:
    """Write ``checkpoints/last.ckpt`` now, at a step boundary, on all ranks; return its path."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.filename == "last"]
    path = Path(str(callbacks[0].dirpath)) / "last.ckpt"
    trainer.save_checkpoint(path)
    return path
