"""Replace checkpoints atomically: the old one stays until the new one is complete.

Nothing is ever written into an existing checkpoint, because it may share its files with another one by hard links.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import distributed

from lightning_gpt.atomic import remove, swap_in, sync_path
from lightning_gpt.checksums import MANIFEST, HashedZip, files_in, folder_digests, is_complete, write_manifest
from lightning_gpt.strategies.agreement import agreed

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Strategy
else:
    _Strategy = object


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint IO for single files: streamed, with a checksum, and replaced atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside the old checkpoint, then replace it.

        Raises:
            OSError: The file cannot be written; the old checkpoint is as before.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        _clear(path)
        try:
            # "x", because an unfinished copy_checkpoint leaves a part that is a hard link of a checkpoint.
            with part.open("xb") as file:
                _write(checkpoint, HashedZip(file))
            swap_in(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(part)
            raise

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, which is never half there under its own name."""
        remove(Path(path))


def _write(checkpoint: dict[str, Any], file: HashedZip) -> None:
    try:
        torch.save(checkpoint, file)  # type: ignore[arg-type]  # torch only calls write and flush
        file.finish()
    except RuntimeError as error:
        raise file.error or error from error


class WholeFolders(_Strategy):
    """A mixin for strategies whose checkpoint is a folder that all ranks write; list it before the strategy.

    All ranks must see the folder (a shared file system).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write beside the old checkpoint, then replace it.

        Raises:
            OSError: A rank cannot write its files; the old checkpoint is as before. All ranks raise it.
        """
        path = Path(self.broadcast(filepath))
        part = _part(path)
        # Tells a folder that lost its manifest from one of an older version, which never had one.
        checkpoint["checksums"] = MANIFEST
        try:
            with agreed():
                if self.is_global_zero:
                    _clear(path)
                    part.mkdir(parents=True)
            with agreed():
                self.write_shards(checkpoint, part)
            with agreed():
                share = self._flushed(part)
            digests = self._merged(share)
            with agreed():
                if self.is_global_zero:
                    _publish(path, digests)
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

    def _flushed(self, folder: Path) -> dict[str, str]:
        """Flush the files that this rank wrote, and return their checksums.

        Another machine's fsync would not flush them, and this one still has them in memory.
        """
        mine = [name for name in files_in(folder) if _writer(name) % self.world_size == self.global_rank]
        for name in mine:
            sync_path(folder / name)
        return folder_digests(folder, mine)

    def _merged(self, share: dict[str, str]) -> dict[str, str]:
        """Return the checksums of all ranks."""
        shares: list[Any] = [share] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(shares, share)
        return {name: digest for share in shares for name, digest in share.items()}


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _writer(name: str) -> int:
    """Return the rank that wrote a file of a folder, from its name; 0 for the files that have no rank."""
    found = re.search(r"(?:^__|zero_pp_rank_)(\d+)", Path(name).name)
    return int(found[1]) if found else 0


def _clear(path: Path) -> None:
    """Delete what a killed save left of a checkpoint, and the checkpoint itself if it lacks files.

    Otherwise it would take the place of a complete one under the name `path` + ".old".
    """
    if path.is_dir() and not is_complete(path):
        remove(path)
    remove(_part(path))


def _publish(path: Path, digests: dict[str, str]) -> None:
    write_manifest(_part(path), digests)
    swap_in(_part(path), path)


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
    part = _part(target)
    _clear(target)
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
