"""Read token embeddings from a file or another model, and extract them to a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gpt.atomic import atomic_file
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.base import empty_model
from lightning_gpt.checkpoint.read.canonical import read_layout, read_tensor
from lightning_gpt.checkpoint.write.canonical import write_tensors
from lightning_gpt.config import UserError
from lightning_gpt.config.commands import EmbeddingsOptions
from lightning_gpt.implementations.registry import token_embedding_name

# Names of the token embeddings in a file with several tensors.
_NAMES = ("wte", "wte.weight", "transformer.wte.weight")


def read_embeddings(path: str, *, trust: bool = False) -> Tensor:
    """Read token embeddings, float (vocabulary, width), without rows of padding.

    Args:
        path: A ``.npy`` or ``.safetensors`` file, or a checkpoint as for ``find_checkpoint``.
        trust: Whether a checkpoint may hold Python objects.

    Raises:
        UserError: There are no embeddings, or the file is damaged.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix)
    if reader is None or file.is_dir():
        return _from_checkpoint(path, trust=trust)
    if not file.is_file():
        raise UserError(f"--pretrained_embeddings {path} does not exist")
    matrix = reader(file)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise UserError(
            f"{path} holds {tuple(matrix.shape)} of {str(matrix.dtype).removeprefix('torch.')}; token embeddings are a"
            " matrix of floats with a row for each token"
        )
    return matrix


def extract_embeddings(options: EmbeddingsOptions) -> Path:
    """Write a model's token embeddings to a file that ``--pretrained_embeddings`` takes.

    Returns:
        The file.

    Raises:
        UserError: There is no such model, or the file cannot be written.
    """
    if len(options.checkpoint) != 1:
        raise UserError("prepare.py embeddings: give one model, for example gpt2 or a Hugging Face folder")
    out = Path(options.out or "")
    if out.suffix not in _READERS:
        raise UserError(f"--out {options.out or 'is missing: it'} must end in {' or '.join(_READERS)}")
    matrix = _from_checkpoint(options.checkpoint[0], trust=options.trust_checkpoint).float()
    try:
        with atomic_file(out) as file:
            if out.suffix == ".npy":
                np.save(file, matrix.numpy())
            else:
                write_tensors(file, {"wte": matrix.to("meta")}, read=lambda name: matrix)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another") from error
    return out


def _from_checkpoint(path: str, *, trust: bool) -> Tensor:
    checkpoint = open_checkpoint(
        find_checkpoint(path, which="best"), trust=trust, n_head=1
    )  # the number of heads does not matter here
    config: dict[str, Any] = checkpoint.model_config
    model = empty_model(checkpoint.implementation, model_config=config)
    name = token_embedding_name(model, vocab_size=config["vocab_size"])
    return checkpoint.weight(name)[: config["vocab_size"] - config.get("vocab_padding", 0)]


def _from_npy(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:  # TypeError: a dtype that torch lacks
        raise UserError(f"{path} is not a readable matrix: {str(error).splitlines()[0]}") from error


def _from_safetensors(path: Path) -> Tensor:
    names = list(read_layout(path))
    known = names if len(names) == 1 else [name for name in _NAMES if name in names]
    if len(known) != 1:
        raise UserError(f"{path} holds {len(names)} tensors; call the token embeddings {_NAMES[0]}")
    return read_tensor(path, known[0])


_READERS = {".npy": _from_npy, ".safetensors": _from_safetensors}
