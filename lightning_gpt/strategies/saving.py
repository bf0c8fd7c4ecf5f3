"""Saving so that a machine that dies while it writes loses nothing: the old checkpoint stays until the new is whole."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from lightning_gpt.atomic import remove, swap_in


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints of one file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes beside the old checkpoint, then takes its place."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        super().save_checkpoint(checkpoint, part, storage_options)
        swap_in(part, path)


class WholeFolders:
    """For strategies whose checkpoint is a folder that all ranks write; mixed in before the strategy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes beside the old checkpoint, then takes its place. The folder must be one that all ranks see."""
        path = Path(self.broadcast(filepath))
        part = path.with_name(path.name + ".part")
        if self.is_global_zero:
            remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            swap_in(part, path)
        self.barrier()
