"""Checkpoints of every strategy and of other programs: find, open lazily, check, convert, load."""

import sys
from collections.abc import Collection
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.checkpoint.base import Checkpoint, tied_names
from lightning_gpt.checkpoint.header import require_contained, require_plausible
from lightning_gpt.checkpoint.read.canonical import CanonicalCheckpoint, canonical_folder, is_converted
from lightning_gpt.checkpoint.read.dcp import DcpCheckpoint
from lightning_gpt.checkpoint.read.deepspeed import DeepSpeedCheckpoint
from lightning_gpt.checkpoint.read.huggingface import HuggingFaceCheckpoint, hub_folder, is_hub_name
from lightning_gpt.checkpoint.read.mapped import MappedFile
from lightning_gpt.checkpoint.read.originals import FILES, MinGPTCheckpoint, NanoGPTCheckpoint
from lightning_gpt.checkpoint.read.single import SingleFileCheckpoint
from lightning_gpt.checkpoint.resume import ExactResume
from lightning_gpt.checkpoint.write.canonical import convert, one_at_a_time
from lightning_gpt.checksums import IncompleteError, read_manifest, verify_checksums
from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.parsing import brief
from lightning_gpt.tokenizers import Tokenizer
from lightning_gpt.trust import is_own, require_honoured, split_name

__all__ = [
    "RUNS",
    "CanonicalCheckpoint",
    "Checkpoint",
    "ExactResume",
    "canonical_folder",
    "convert",
    "ensure_canonical",
    "find_checkpoint",
    "load",
    "open_checkpoint",
    "saved_at",
    "tied_names",
]

RUNS = Path("runs")
FOLDERS = (HuggingFaceCheckpoint, CanonicalCheckpoint, DcpCheckpoint, DeepSpeedCheckpoint)


def find_checkpoint(path: str, *, which: str, out_dir: str | None = None) -> Path:
    """Find the checkpoint that a user named: a file, or a folder that is a checkpoint.

    Args:
        path: A checkpoint, a folder that holds one (such as a run folder), "latest", or a name on the Hugging Face hub
            if no such file exists here.
        which: "best" or "last", for a run folder; "last" is used if there is no best yet.
        out_dir: The run folder in which "latest" looks; by default the newest one in ``runs/``.

    Raises:
        UserError: There is no such checkpoint.
    """
    if which not in ("best", "last"):
        raise UserError(f"--which {which} is unknown; choose best or last")
    if path == "latest" and out_dir is None:
        saved = [p for ending in ("ckpt", "ckpt.old") for p in RUNS.glob(f"*/checkpoints/*.{ending}")]
        found = sorted(filter(_is_complete, saved), key=saved_at)
        if not found:
            raise UserError(f"no run with a checkpoint in {RUNS}/ yet; train one first, or give a path")
        path = str(found[-1].parent.parent)
    folder = Path(out_dir if path == "latest" and out_dir else path)
    if not folder.exists() and is_hub_name(path):
        folder = hub_folder(path)
    if folder.is_file() or any(reader.recognises(folder) for reader in FOLDERS):
        return _complete(folder)
    if not folder.exists():
        # Only NAME.ckpt.old exists if the machine died between the two renames that replace a folder.
        old = _old(folder)
        if not _is_complete(old):
            raise UserError(f"checkpoint {folder} does not exist; give a run folder or a checkpoint")
        return old.resolve()
    for name in (which, "last", "best"):
        file = folder / "checkpoints" / f"{name}.ckpt"
        if file.exists() or _old(file).exists():
            return _complete(file)
    for name in FILES:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(f"{folder} holds no checkpoints/last.ckpt or checkpoints/best.ckpt; is it a run folder?")


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _complete(path: Path) -> Path:
    """Return a checkpoint, or the one that it replaced if it is incomplete or missing.

    Raises:
        IncompleteError: Neither is complete. No other checkpoint is taken instead, because it is older.
    """
    if not _is_complete(path) and _is_complete(_old(path)):
        return _old(path).resolve()
    _require_complete(path)
    return path.resolve()


def _is_complete(path: Path) -> bool:
    try:
        _require_complete(path)
    except IncompleteError:
        return False
    return True


def _require_complete(path: Path) -> None:
    """Raise an IncompleteError for a checkpoint that lacks files; do not complain about damaged ones."""
    if path.is_file():
        return
    try:
        if read_manifest(path) is not None:
            return
        if not any(reader.recognises(path) for reader in FOLDERS):
            raise IncompleteError(f"{path} is incomplete: it lacks the files of a checkpoint; copy it again")
        open_checkpoint(path)
    except IncompleteError:
        raise
    except UserError:
        pass


def saved_at(path: Path) -> float:
    """Return when a checkpoint was last written, in seconds since the epoch.

    A folder's own time does not show that its files were overwritten.
    """
    return max(p.stat().st_mtime for p in (path, *path.glob("*")))


def open_checkpoint(
    path: Path,
    *,
    trust: bool = False,
    n_head: int | None = None,
    typed: Collection[str] | None = None,
    verify: bool = False,
) -> Checkpoint:
    """Open a checkpoint of any form; weights are read on demand.

    Nothing in it runs code unless it is trusted or the user's own: it may hold tensors and plain values only, and name
    only a built-in implementation.

    Args:
        path: A file or folder, as ``find_checkpoint`` returns.
        trust: Whether it may hold Python objects and name code; those in the user's own run folders always may.
        n_head: Number of attention heads, for a checkpoint that does not say.
        typed: Implementations that the user typed in this command, which it may name; None if there is no such option.
        verify: Whether to compare it with its checksums first, and to print the result on stderr.

    Raises:
        UserError: The form is unknown, the checkpoint is damaged, contradicts itself, or would run code and is not
            trusted.
    """
    if verify:
        _verify(path)
    trust = trust or is_own(path)
    try:
        require_contained(path)
        checkpoint = _open(path, trust=trust, n_head=n_head)
        name = checkpoint.implementation
        if split_name(name):
            require_honoured(name, flag="implementation", source=path, trust=trust, typed=typed)
        checkpoint.trusted = trust
        require_plausible(checkpoint.stored, implementation=name, fields=checkpoint.model_config, path=path)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise UserError(f"{path} does not have the layout of a known checkpoint: {brief(error)}") from error
    return checkpoint


def _open(path: Path, *, trust: bool, n_head: int | None) -> Checkpoint:
    if path.is_file():
        return _open_file(path, trust=trust, n_head=n_head)
    for reader in FOLDERS:
        if reader.recognises(path):
            return reader(path, trust=trust)
    raise UserError(
        f"{path} is not a checkpoint; give a .ckpt file, a folder that FSDP or DeepSpeed training wrote, a converted"
        " one, or a Hugging Face folder"
    )


def _verify(path: Path) -> None:
    done = verify_checksums(path)
    result = f"verified {done.files} files, {done.size / 1e6:,.1f} MB" if done else "no checksums to verify against"
    rank_zero_only(print)(f"{path}: {result}", file=sys.stderr)


def _open_file(path: Path, *, trust: bool, n_head: int | None) -> Checkpoint:
    file = MappedFile(path, trust=trust)
    if NanoGPTCheckpoint.recognises(file.content):
        return NanoGPTCheckpoint(file)
    if MinGPTCheckpoint.recognises(file.content):
        return MinGPTCheckpoint(file, n_head=n_head)
    return SingleFileCheckpoint(file)


def ensure_canonical(path: Path, *, trust: bool = False, verify: bool = False) -> Checkpoint:
    """Open a checkpoint in a form that is fast to read: a sharded one is converted first, unless it already was.

    If several processes call this at once, as under torchrun, one converts and the others wait.

    Args:
        path: As for ``open_checkpoint``.
        trust: As for ``open_checkpoint``.
        verify: As for ``open_checkpoint``; the canonical form is verified as well.

    Returns:
        The checkpoint, or for a sharded one its canonical form in a folder beside it.

    Raises:
        UserError: As for ``open_checkpoint``, or the folder beside it cannot be written.
    """
    checkpoint = open_checkpoint(path, trust=trust, verify=verify)
    if not checkpoint.in_shards:
        return checkpoint
    folder = canonical_folder(path)
    with one_at_a_time(path):
        if not is_converted(folder, source=path):
            convert(checkpoint, folder)
        return open_checkpoint(folder, trust=checkpoint.trusted, verify=verify)


def load(
    path: str | Path = "latest", *, which: str = "best", trust: bool = False
) -> tuple[GPTModule, Tokenizer | None]:
    """Load a trained model on the CPU, in eval mode, and its tokenizer.

    Args:
        path: As for ``find_checkpoint``.
        which: As for ``find_checkpoint``.
        trust: As for ``open_checkpoint``.

    Returns:
        The module, and the tokenizer or None if it is unknown.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it does not fit its model.
    """
    checkpoint = ensure_canonical(find_checkpoint(str(path), which=which), trust=trust)
    return checkpoint.module().eval(), checkpoint.tokenizer
