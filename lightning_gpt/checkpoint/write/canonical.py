"""Write the canonical form (see ``read/canonical.py``), in a folder that appears whole or not at all."""

import contextlib
import glob
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lightning_gpt.atomic import locked, remove, swap_in
from lightning_gpt.checkpoint.base import Checkpoint, raw_bytes
from lightning_gpt.checkpoint.read.canonical import (
    CONFIG,
    DTYPES,
    FORMAT,
    OPTIMIZER,
    STATE_DICT,
    TOKENIZER,
    TRAINING,
    VERSION,
    WEIGHTS,
    fingerprint,
    read_config,
)
from lightning_gpt.checksums import files_in, folder_digests, write_manifest
from lightning_gpt.config import UserError
from lightning_gpt.progress import PATIENCE, Progress


def convert(checkpoint: Checkpoint, folder: Path, *, optimizer: bool = False, pt: bool = False) -> Path:
    """Write the canonical form of a checkpoint, one tensor at a time, replacing an earlier one.

    Args:
        checkpoint: The checkpoint.
        folder: The folder to create or replace.
        optimizer: Whether to include the optimizer state and the header, which training needs to resume.
        pt: Whether to also write the weights as ``model.pt``, a plain state dict, which is built in memory.

    Returns:
        The folder.

    Raises:
        UserError: The folder cannot be written or holds something else, or there is no optimizer state to include.
    """
    if optimizer and not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds no optimizer state to convert")
    if folder.exists() and read_config(folder) is None:
        raise UserError(f"{folder} exists and is not a converted checkpoint; move it away, or choose another folder")
    with whole_folder(folder, source=checkpoint.path) as part:
        source = {"name": checkpoint.path.name, "fingerprint": fingerprint(checkpoint.path)}
        write_json(part / CONFIG, describe(checkpoint) | {"source": source})
        if checkpoint.tokenizer is not None:
            write_json(part / TOKENIZER, checkpoint.tokenizer.to_dict())
        write_weights(part / WEIGHTS, checkpoint)
        if optimizer:
            moments = {checkpoint.ties.get(name, name): state for name, state in checkpoint.moments.items()}
            states = {f"{name}/{key}": tensor for name, state in moments.items() for key, tensor in state.items()}
            write_safetensors(part / OPTIMIZER, states, read=checkpoint.moment)
            torch.save(checkpoint.header, part / TRAINING)
        if pt:
            torch.save(checkpoint.state_dict(), part / STATE_DICT)
    return folder


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the canonical ``config.json`` of a checkpoint, without its source."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "implementation": checkpoint.implementation,
        "model_config": checkpoint.model_config,
        "step": checkpoint.step,
        "data": checkpoint.data,
        "task": checkpoint.task_fields,
        "ties": checkpoint.ties,
    }


def write_weights(path: Path, checkpoint: Checkpoint) -> None:
    """Write the weights of a checkpoint as safetensors, one at a time."""
    write_safetensors(path, checkpoint.layout(), read=checkpoint.weight)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, layout: dict[str, Tensor], *, read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, holding one tensor at a time; see ``write_tensors``."""
    with path.open("wb") as file:
        write_tensors(file, layout, read=read)


def write_tensors(file: IO[bytes], layout: dict[str, Tensor], *, read: Callable[[str], Tensor]) -> None:
    """Write tensors in the safetensors format: header length (8 bytes, little-endian), JSON header, tensor bytes.

    Args:
        file: An open file.
        layout: The tensors on the meta device, by name.
        read: Reads the tensor of a name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in layout.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    with Progress("write", total=end, unit="bytes", delay=PATIENCE) as progress:
        for name, expected in layout.items():
            tensor = read(name)
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, name
            progress.update(progress.done + file.write(raw_bytes(tensor)))


@contextlib.contextmanager
def whole_folder(folder: Path, *, source: Path) -> Iterator[Path]:
    """Yield a folder to write into: with its checksums, it replaces `folder` on success; it is removed on error.

    Args:
        folder: The folder to create or replace.
        source: The checkpoint that it is made from.

    Raises:
        UserError: The folder cannot be written, or the source was replaced meanwhile.
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    before = fingerprint(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder):
            _remove_unfinished(folder)
            part.mkdir()
            yield part
            if fingerprint(source) != before:
                raise UserError(f"{source} was replaced while it was read; try again")
            write_manifest(part, folder_digests(part, files_in(part)))
            swap_in(part, folder, old=folder.with_name(f".{folder.name}.old"))  # a user may own FOLDER.old
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def _remove_unfinished(folder: Path) -> None:
    """Delete what killed conversions left beside a folder; the caller holds its lock, so no other one is running."""
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.????????.part"):
        with contextlib.suppress(OSError):
            remove(part)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process or thread at a time work on a checkpoint; the others wait.

    The lock is a hidden file beside the checkpoint, so that it also works between machines that share the folder. It is
    removed afterwards, and released by a crash. In a read-only folder nothing is locked.
    """
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
