"""Read the canonical form: a folder of safetensors and JSON that other tools can read as well.

``model.safetensors`` holds each weight once, under its first name in the plain model. ``config.json`` describes the
model and the checkpoint that the folder was made from. ``lightning_gpt_tokenizer.json`` holds the tokenizer; the name
does not clash with Hugging Face's. If the optimizer is included, ``optimizer.safetensors`` holds each state as
``WEIGHT/STATE``, and ``training.pt`` holds the whole header, which is not JSON because its metrics are tensors.
``SHA256SUMS`` lists the checksums of these files.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_gpt.checkpoint.base import Checkpoint
from lightning_gpt.checkpoint.read.mapped import read_header, unreadable
from lightning_gpt.config import UserError
from lightning_gpt.parsing import read_json, shown
from lightning_gpt.tokenizers import Tokenizer, tokenizer_from_dict

FORMAT, VERSION = "lightning-gpt", 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "lightning_gpt_tokenizer.json"
OPTIMIZER, TRAINING, STATE_DICT = "optimizer.safetensors", "training.pt", "model.pt"

# Names of dtypes in a safetensors header.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CanonicalCheckpoint(Checkpoint):
    """A folder that ``convert`` wrote. Nothing in it can run code.

    Args:
        path: The folder.
        trust: Not used.

    Raises:
        UserError: The folder is damaged, or another program wrote it.
    """

    kind = "converted"

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        config = read_config(path)
        if config is None:
            raise UserError(f"{path / CONFIG} was not written by lightning-gpt")
        if config.get("version") != VERSION:
            version = shown(config.get("version"))
            raise UserError(f"{path} has version {version} of the format; this program reads {VERSION}")
        ties = config.get("ties")
        if not isinstance(ties, dict) or not all(isinstance(name, str) for name in ties.values()):
            raise UserError(f"{path / CONFIG} is damaged: its ties are {shown(ties)}")
        if (path / TRAINING).exists():
            header = read_header(path / TRAINING, trust=False)
        else:
            tokenizer = tokenizer_beside(path / WEIGHTS)
            header = {
                "hyper_parameters": {k: config[k] for k in ("implementation", "model_config") if k in config},
                "global_step": config.get("step", 0),
                "TokenData": {
                    "data": config.get("data"),
                    "task": config.get("task"),
                    "tokenizer": tokenizer.to_dict() if tokenizer else None,
                },
            }
        super().__init__(path, header)
        self.stored = read_layout(path / WEIGHTS)
        self.moments = {}
        if (path / OPTIMIZER).exists():
            for full_name, tensor in read_layout(path / OPTIMIZER).items():
                name, _, key = full_name.rpartition("/")
                self.moments.setdefault(name, {})[key] = tensor

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a folder holds weights and a config."""
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied names of the model, read from the config instead of a model."""
        config = read_config(self.path)
        assert config is not None
        return config["ties"]

    def _read(self, name: str) -> Tensor:
        return read_tensor(self.path / WEIGHTS, name)

    def _read_moment(self, name: str, key: str) -> Tensor:
        return read_tensor(self.path / OPTIMIZER, f"{name}/{key}")


def canonical_folder(path: Path) -> Path:
    """Return the folder for a checkpoint's canonical form: ``best/`` for ``best.ckpt``, else ``NAME-converted/``."""
    name = path.name.removesuffix(".old")  # what a killed save left is converted to the same folder
    return path.with_name(name.removesuffix(".ckpt") if name.endswith(".ckpt") else f"{name}-converted")


def fingerprint(path: Path) -> str:
    """Return a digest of the names, sizes and times of a checkpoint's files, to detect changes."""
    digest = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def is_converted(folder: Path, *, source: Path) -> bool:
    """Return whether a folder is the canonical form of a checkpoint in its current state."""
    config = read_config(folder) if CanonicalCheckpoint.recognises(folder) else None
    made_from = config.get("source") if config else None
    return isinstance(made_from, dict) and made_from.get("fingerprint") == fingerprint(source)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config of a canonical folder; None if there is none or another program wrote it.

    Raises:
        UserError: The file is damaged.
    """
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG)
    return config if isinstance(config, dict) and config.get("format") == FORMAT else None


def tokenizer_beside(path: Path) -> Tokenizer | None:
    """Return the tokenizer in our tokenizer file beside a weights file, if there is one.

    Raises:
        UserError: The tokenizer file is damaged.
    """
    file = path.with_name(TOKENIZER)
    return tokenizer_from_dict(read_json(file)) if file.is_file() else None


# The two functions below open the file for each call, because a memory map counts as memory until it is closed.


def read_layout(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file on the meta device, by name.

    Raises:
        UserError: The file is damaged.
    """
    dtypes = {text: dtype for dtype, text in DTYPES.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: torch.empty(tuple(s.get_shape()), dtype=dtypes[s.get_dtype()], device="meta")
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:  # RuntimeError: a size that torch cannot have
        raise unreadable(path, error) from error


def read_tensor(path: Path, name: str) -> Tensor:
    """Return a copy of one tensor of a safetensors file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
