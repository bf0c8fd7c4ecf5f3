"""Replace checkpoints atomically: the old one stays until the new one is complete.

Nothing is ever written into an existing checkpoint, because it may share its files with another one by hard links.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import TorchCheckpointIO

from lightning_gpt.atomic import remove, swap_in
from lightning_gpt.strategies.agreement import agreed

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
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            swap_in(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(part)
            raise


class WholeFolders(_Strategy):
    """A mixin for strategies whose checkpoint is a folder that all ranks write; list it before the strategy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write beside the old checkpoint, then replace it. All ranks must see the folder (a shared file system).

        Raises:
            OSError: A rank could not write, on all ranks alike; the old checkpoint is as before.
        """
        path = Path(self.broadcast(filepath))
        part = path.with_name(path.name + ".part")
        try:
            with agreed():
                if self.is_global_zero:
                    remove(part)
                    part.mkdir()
            with agreed():
                self.write_shards(checkpoint, part)
            with agreed():
                if self.is_global_zero:
                    swap_in(part, path)
        except OSError:
            if self.is_global_zero:
                with contextlib.suppress(OSError):
                    remove(part)
            raise

    def write_shards(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write this rank's shards of a checkpoint into an empty folder, called on all ranks.

        Raises:
            Exception: This rank or another could not write; no rank is left waiting.
        """
        super().save_checkpoint(checkpoint, folder)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Replace `target` by a copy of a complete checkpoint, atomically; call this on one rank.

    Files are hard-linked, so that the copy takes no space and no time, or copied where the file system has no hard
    links. The copy stays as it is when `source` is replaced or deleted.

    Args:
        source: A checkpoint, which no process is writing: a file or a folder.
        target: The checkpoint to create or replace, in an existing folder.

    Raises:
        OSError: The copy cannot be written; `target` is as before.
    """
    part = target.with_name(target.name + ".part")
    remove(part)
    try:
        if source.is_dir():
            shutil.copytree(source, part, copy_function=_link_or_copy)
        else:
            _link_or_copy(source, part)
        swap_in(part, target)
    finally:
        # Renaming a hard link onto another one of the same file leaves both.
        with contextlib.suppress(OSError):
            remove(part)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
