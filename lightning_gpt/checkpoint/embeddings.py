"""Token embeddings from elsewhere: a matrix in a file, or another model's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.base import empty_model
from lightning_gpt.checkpoint.read.canonical import layout, read_tensor, write_safetensors
from lightning_gpt.config import EmbeddingsOptions, UserError
from lightning_gpt.implementations.registry import token_embedding_name

# What token embeddings are called in a file that has more than one tensor.
_NAMES = ("wte", "wte.weight", "transformer.wte.weight")


def read_embeddings(path: str, *, trust: bool = False) -> Tensor:
    """Token embeddings of shape (vocabulary, width), without rows of padding.

    Args:
        path: A ``.npy`` or ``.safetensors`` file, or any checkpoint that ``find_checkpoint`` takes.
        trust: Whether a checkpoint may hold Python objects.

    Raises:
        UserError: There are none, or the file is damaged.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix)
    if reader is None or file.is_dir():
        return _of_checkpoint(path, trust=trust)
    if not file.is_file():
        raise UserError(f"--pretrained_embeddings {path} does not exist")
    matrix = reader(file)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise UserError(
            f"{path} holds {tuple(matrix.shape)} of {str(matrix.dtype).removeprefix('torch.')}; token embeddings are a"
            " matrix of floats, a row for each token"
        )
    return matrix


def extract_embeddings(options: EmbeddingsOptions) -> Path:
    """Writes a model's token embeddings to a file that ``--pretrained_embeddings`` takes.

    Returns:
        The file.

    Raises:
        UserError: There is no such model, or the file cannot be written.
    """
    if len(options.checkpoint) != 1:
        raise UserError("embeddings takes one model: a folder of Hugging Face's GPT-2, say, or gpt2")
    out = Path(options.out or "")
    if out.suffix not in _READERS:
        raise UserError(f"--out {options.out or 'is missing: it'} must end in {' or '.join(_READERS)}")
    matrix = _of_checkpoint(options.checkpoint[0], trust=options.trust_checkpoint).float()
    temporary = out.with_name(f".{out.name}")
    try:
        if out.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, matrix.numpy())
        else:
            write_safetensors(temporary, {"wte": matrix.to("meta")}, read=lambda name: matrix)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _of_checkpoint(path: str, *, trust: bool) -> Tensor:
    checkpoint = open_checkpoint(find_checkpoint(path, which="best"), trust=trust, n_head=1)  # how many changes nothing
    config: dict[str, Any] = checkpoint.model_config
    model = empty_model(checkpoint.implementation, model_config=config)
    name = token_embedding_name(model, vocab_size=config["vocab_size"])
    return checkpoint.weight(name)[: config["vocab_size"] - config.get("vocab_padding", 0)]


def _of_npy(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:  # the last for a type that torch does not have
        raise UserError(f"{path} is not a readable matrix: {str(error).splitlines()[0]}") from error


def _of_safetensors(path: Path) -> Tensor:
    names = list(layout(path))
    known = names if len(names) == 1 else [name for name in _NAMES if name in names]
    if len(known) != 1:
        raise UserError(f"{path} holds {len(names)} tensors; call the token embeddings {_NAMES[0]}")
    return read_tensor(path, known[0])


_READERS = {".npy": _of_npy, ".safetensors": _of_safetensors}
