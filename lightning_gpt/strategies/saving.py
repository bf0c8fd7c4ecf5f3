"""Replace checkpoints atomically: the old one stays until the new one is complete."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import TorchCheckpointIO

from lightning_gpt.atomic import remove, swap_in

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Strategy
else:
    _Strategy = object


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint IO for single files, replaced atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside the old checkpoint, then replace it."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        super().save_checkpoint(checkpoint, part, storage_options)
        swap_in(part, path)


class WholeFolders(_Strategy):
    """A mixin for strategies whose checkpoint is a folder that all ranks write; list it before the strategy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write beside the old checkpoint, then replace it. All ranks must see the folder (a shared file system)."""
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
