"""Checkpoints of any strategy: found, opened lazily, checked, turned into one canonical form, and resumed from."""

from pathlib import Path

from lightning_gpt.checkpoint.base import Checkpoint, MappedFile, is_own, remember_run, tied_names
from lightning_gpt.checkpoint.read.canonical import (
    CanonicalCheckpoint,
    canonical_folder,
    convert,
    is_converted,
    one_at_a_time,
)
from lightning_gpt.checkpoint.read.dcp import DcpCheckpoint
from lightning_gpt.checkpoint.read.deepspeed import DeepSpeedCheckpoint
from lightning_gpt.checkpoint.read.huggingface import HuggingFaceCheckpoint, hub_folder, is_hub_name
from lightning_gpt.checkpoint.read.originals import FILES, MinGPTCheckpoint, NanoGPTCheckpoint
from lightning_gpt.checkpoint.read.single import SingleFileCheckpoint
from lightning_gpt.checkpoint.resume import ExactResume
from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.tokenizers import Tokenizer

__all__ = [
    "RUNS",
    "Checkpoint",
    "ExactResume",
    "canonical_folder",
    "convert",
    "ensure_canonical",
    "find_checkpoint",
    "is_own",
    "load",
    "open_checkpoint",
    "remember_run",
    "tied_names",
]

RUNS = Path("runs")
FOLDERS = (HuggingFaceCheckpoint, CanonicalCheckpoint, DcpCheckpoint, DeepSpeedCheckpoint)


def find_checkpoint(path: str, *, which: str, out_dir: str | None = None) -> Path:
    """The checkpoint that a user means: a file, or a folder that is one.

    Args:
        path: A checkpoint of ours or of another program, a folder that holds one, such as a run's, "latest", or, where
            no such file is here, a name on the Hugging Face hub.
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
    if not folder.exists() and is_hub_name(path):
        folder = hub_folder(path)
    if not folder.exists():
        raise UserError(f"checkpoint {folder} does not exist; give a run folder or a checkpoint")
    if folder.is_file() or any(reader.recognises(folder) for reader in FOLDERS):
        return folder.resolve()
    for name in (which, "last", "best"):
        for file in (folder / "checkpoints" / f"{name}.ckpt", folder / "checkpoints" / f"{name}.ckpt.old"):
            if file.exists():  # the old one alone, where a machine died between the two moves that replace it
                return file.resolve()
    for name in FILES:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(f"{folder} holds no checkpoints/last.ckpt or checkpoints/best.ckpt; is it a run folder?")


def _saved_at(path: Path) -> float:
    """When a checkpoint was written last; a folder's own time stands still when its files are overwritten."""
    return max(p.stat().st_mtime for p in (path, *path.glob("*")))


def open_checkpoint(path: Path, *, trust: bool = False, n_head: int | None = None) -> Checkpoint:
    """Opens a checkpoint of any kind; weights are read when they are asked for.

    Args:
        path: A file or folder, such as ``find_checkpoint`` returns.
        trust: Whether it may hold Python objects, which can run code; one in the user's own run folders may anyway.
        n_head: How many attention heads the model has, for a checkpoint that does not say.

    Raises:
        UserError: It is of no kind that is known, is damaged, or holds Python objects and is not trusted.
    """
    trust = trust or is_own(path)
    try:
        if path.is_file():
            return _open_file(path, trust=trust, n_head=n_head)
        for reader in FOLDERS:
            if reader.recognises(path):
                return reader(path, trust=trust)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not laid out as a checkpoint that this program knows: {error!r}") from error
    raise UserError(
        f"{path} is not a checkpoint; give a .ckpt file, a folder that FSDP or DeepSpeed training wrote, a converted"
        " one, or a folder of Hugging Face's GPT-2"
    )


def _open_file(path: Path, *, trust: bool, n_head: int | None) -> Checkpoint:
    file = MappedFile(path, trust=trust)
    if NanoGPTCheckpoint.holds(file.content):
        return NanoGPTCheckpoint(file)
    if MinGPTCheckpoint.holds(file.content):
        return MinGPTCheckpoint(file, n_head=n_head)
    return SingleFileCheckpoint(file)


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
    if not checkpoint.in_shards:
        return checkpoint
    folder = canonical_folder(path)
    with one_at_a_time(path):
        if not is_converted(folder, source=path):
            convert(checkpoint, folder)
        return CanonicalCheckpoint(folder)


def load(
    path: str | Path = "latest", *, which: str = "best", trust: bool = False
) -> tuple[GPTModule, Tokenizer | None]:
    """A trained model on the CPU, ready to write or to be scored (in eval mode), and its tokenizer.

    Args:
        path: As for ``find_checkpoint``.
        which: As for ``find_checkpoint``.
        trust: As for ``open_checkpoint``.

    Returns:
        The module, and the tokenizer, None where the checkpoint does not know it.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or does not fit its model.
    """
    checkpoint = ensure_canonical(find_checkpoint(str(path), which=which), trust=trust)
    return checkpoint.module().eval(), checkpoint.tokenizer
