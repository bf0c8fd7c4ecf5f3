"""Checkpoints of any strategy: found, opened lazily, checked, turned into one canonical form, and resumed from."""

from pathlib import Path

from lightning_gpt.checkpoint.base import Checkpoint, is_own, remember_run, tied_names
from lightning_gpt.checkpoint.canonical import (
    CanonicalCheckpoint,
    canonical_folder,
    convert,
    is_converted,
    one_at_a_time,
)
from lightning_gpt.checkpoint.dcp import DcpCheckpoint
from lightning_gpt.checkpoint.deepspeed import DeepSpeedCheckpoint
from lightning_gpt.checkpoint.resume import ExactResume
from lightning_gpt.checkpoint.single import SingleFileCheckpoint
from lightning_gpt.config import UserError

__all__ = [
    "RUNS",
    "Checkpoint",
    "ExactResume",
    "canonical_folder",
    "convert",
    "ensure_canonical",
    "find_checkpoint",
    "is_own",
    "open_checkpoint",
    "remember_run",
    "tied_names",
]

RUNS = Path("runs")
READERS = (CanonicalCheckpoint, DcpCheckpoint, DeepSpeedCheckpoint, SingleFileCheckpoint)


def find_checkpoint(path: str, *, which: str, out_dir: str | None = None) -> Path:
    """The checkpoint that a user means: a file, or the folder that a sharded strategy or ``convert`` writes.

    Args:
        path: A checkpoint, a run folder, or "latest".
        which: "best" or "last", for a run folder; where it has no best yet, the last is taken.
        out_dir: The run folder that "latest" looks into; without it, the newest of ``runs/``.

    Raises:
        UserError: There is none.
    """
    if which not in ("best", "last"):
        raise UserError(f"--which {which} is unknown; choose best or last")
    if path == "latest" and out_dir is None:
        found = sorted(RUNS.glob("*/checkpoints/*.ckpt"), key=_saved_at)
        if not found:
            raise UserError(f"no run with a checkpoint in {RUNS}/ yet; train one first, or give a path")
        path = str(found[-1].parent.parent)
    folder = Path(out_dir if path == "latest" and out_dir else path)
    if not folder.exists():
        raise UserError(f"checkpoint {folder} does not exist; give a run folder or a checkpoint")
    if any(reader.recognises(folder) for reader in READERS):
        return folder.resolve()
    for name in (which, "last", "best"):
        for file in (folder / "checkpoints" / f"{name}.ckpt", folder / "checkpoints" / f"{name}.ckpt.old"):
            if file.exists():  # the old one alone, where a machine died between the two moves that replace it
                return file.resolve()
    raise UserError(f"{folder} holds no checkpoints/last.ckpt or checkpoints/best.ckpt; is it a run folder?")


def _saved_at(path: Path) -> float:
    """When a checkpoint was written last; a folder's own time stands still when its files are overwritten."""
    return max(p.stat().st_mtime for p in (path, *path.glob("*")))


def open_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Opens a checkpoint of any kind; weights are read when they are asked for.

    Args:
        path: A file or folder, such as ``find_checkpoint`` returns.
        trust: Whether it may hold Python objects, which can run code; one in the user's own run folders may anyway.

    Raises:
        UserError: It is no checkpoint of ours, is damaged, or holds Python objects and is not trusted.
    """
    for reader in READERS:
        if not reader.recognises(path):
            continue
        try:
            return reader(path, trust=trust or is_own(path))
        except UserError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not laid out as a checkpoint that this program knows: {error!r}") from error
    raise UserError(
        f"{path} is not a checkpoint; give a .ckpt file, a folder that FSDP or DeepSpeed training wrote, or a converted"
        " one"
    )


def ensure_canonical(path: Path, *, trust: bool = False) -> Checkpoint:
    """Opens a checkpoint as it is where that is fast, else its canonical form, converted beside it if need be.

    Processes that ask at the same time, such as torchrun's, wait for the one that converts.

    Args:
        path: As for ``open_checkpoint``.
        trust: As for ``open_checkpoint``.

    Raises:
        UserError: As for ``open_checkpoint``, or the folder beside it cannot be written.
    """
    checkpoint = open_checkpoint(path, trust=trust)
    if isinstance(checkpoint, SingleFileCheckpoint | CanonicalCheckpoint):
        return checkpoint
    folder = canonical_folder(path)
    with one_at_a_time(path):
        if not is_converted(folder, source=path):
            convert(checkpoint, folder)
        return CanonicalCheckpoint(folder)
