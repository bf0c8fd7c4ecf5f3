"""The canonical form: a folder of safetensors and JSON that other tools read as well.

``model.safetensors`` holds each weight once, under its first name in the plain model; ``config.json`` says what the
model is and what the folder was made from; the tokenizer lies in ``lightning_gpt_tokenizer.json``, a name that Hugging
Face does not take for one of its own. With the optimizer come ``optimizer.safetensors``, each state as
``WEIGHT/STATE``, and ``training.pt``, the whole header, whose metrics are tensors and so do not go into JSON.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_gpt.checkpoint.base import Checkpoint, read_header, unreadable
from lightning_gpt.config import UserError
from lightning_gpt.tokenizers import Tokenizer, tokenizer_from_dict

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

FORMAT, VERSION = "lightning-gpt", 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "lightning_gpt_tokenizer.json"
OPTIMIZER, TRAINING, STATE_DICT = "optimizer.safetensors", "training.pt", "model.pt"

_DTYPES = {
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
    """A folder that ``convert`` wrote.

    Args:
        path: The folder.
        trust: Nothing in it can run code, so this changes nothing.

    Raises:
        UserError: It is not such a folder, or is damaged.
    """

    kind = "converted"

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        config = read_config(path)
        if config is None:
            raise UserError(f"{path / CONFIG} is not one that lightning-gpt wrote")
        if config.get("version") != VERSION:
            raise UserError(f"{path} has version {config.get('version')} of the format; this program reads {VERSION}")
        if (path / TRAINING).exists():
            header = read_header(path / TRAINING, trust=False)
        else:
            tokenizer = tokenizer_beside(path / WEIGHTS)
            tokenizer = tokenizer.to_dict() if tokenizer else None
            header = {
                "hyper_parameters": {k: config[k] for k in ("implementation", "model_config") if k in config},
                "global_step": config.get("step", 0),
                "TokenData": {"data": config.get("data"), "task": config.get("task"), "tokenizer": tokenizer},
            }
        super().__init__(path, header)
        self.stored = layout(path / WEIGHTS)
        self.moments = {}
        if (path / OPTIMIZER).exists():
            for full_name, tensor in layout(path / OPTIMIZER).items():
                name, _, key = full_name.rpartition("/")
                self.moments.setdefault(name, {})[key] = tensor

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with weights and a config."""
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied names of its model, as the config has them."""
        config = read_config(self.path)
        assert config is not None
        return config["ties"]

    def _read(self, name: str) -> Tensor:
        return read_tensor(self.path / WEIGHTS, name)

    def _read_moment(self, name: str, key: str) -> Tensor:
        return read_tensor(self.path / OPTIMIZER, f"{name}/{key}")


def canonical_folder(path: Path) -> Path:
    """Where the canonical form of a checkpoint goes: ``best/`` beside ``best.ckpt``, else ``NAME-converted/``."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}-converted")


def fingerprint(path: Path) -> str:
    """A digest of the names, sizes and times of a checkpoint's files, by which a change is noticed."""
    digest = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def is_converted(folder: Path, *, source: Path) -> bool:
    """Whether a folder is the canonical form of a checkpoint as it is now."""
    config = read_config(folder) if CanonicalCheckpoint.recognises(folder) else None
    return config is not None and config.get("source", {}).get("fingerprint") == fingerprint(source)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process or thread after another work on a checkpoint, where the system can lock files."""
    held = None
    with contextlib.suppress(OSError):  # a network's file system may refuse
        if fcntl is not None:
            held = os.open(path, os.O_RDONLY)  # nothing is written, also for a folder
            fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def convert(checkpoint: Checkpoint, folder: Path, *, optimizer: bool = False, pt: bool = False) -> Path:
    """Writes the canonical form of a checkpoint, one tensor at a time.

    The folder appears whole or not at all; an older canonical folder of its name is replaced.

    Args:
        checkpoint: What is written.
        folder: Where to.
        optimizer: Whether the optimizer's state and what else training needs to go on are written, too.
        pt: Whether the weights are also written as ``model.pt``, a plain state dict; it is built in memory.

    Returns:
        The folder.

    Raises:
        UserError: The folder cannot be written or is something else, or there is no optimizer's state to write.
    """
    if optimizer and not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds no optimizer state to convert")
    if folder.exists() and read_config(folder) is None:
        raise UserError(f"{folder} exists and is not a converted checkpoint; move it away, or choose another folder")
    with whole_folder(folder, source=checkpoint.path) as temporary:
        described = describe(checkpoint) | {
            "source": {"name": checkpoint.path.name, "fingerprint": fingerprint(checkpoint.path)}
        }
        write_json(temporary / CONFIG, described)
        if checkpoint.tokenizer is not None:
            write_json(temporary / TOKENIZER, checkpoint.tokenizer.to_dict())
        write_weights(temporary / WEIGHTS, checkpoint)
        if optimizer:
            moments = {checkpoint.ties.get(name, name): state for name, state in checkpoint.moments.items()}
            states = {f"{name}/{key}": tensor for name, state in moments.items() for key, tensor in state.items()}
            write_safetensors(temporary / OPTIMIZER, states, read=checkpoint.moment)
            torch.save(checkpoint.header, temporary / TRAINING)
        if pt:
            torch.save(checkpoint.state_dict(), temporary / STATE_DICT)
    return folder


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The canonical ``config.json`` of a checkpoint, without where it came from."""
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
    """Writes a checkpoint's weights as safetensors, one at a time."""
    write_safetensors(path, checkpoint.layout(), read=checkpoint.weight)


def write_json(path: Path, content: Any) -> None:
    """Writes a small JSON file to be read by people, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path, *, source: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of another when it is whole; after an error nothing of it is left.

    Args:
        folder: The place.
        source: The checkpoint that it is made from.

    Raises:
        UserError: It cannot be written, or the checkpoint was written anew meanwhile.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    before = fingerprint(source)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if fingerprint(source) != before:
            raise UserError(f"{source} was replaced while it was read; try again")
        _replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    """Puts a folder into the place of another, which other processes may do at the same time."""
    for _ in range(10):
        if folder.exists():
            old = new.with_name(new.name + "-old")
            try:
                os.rename(folder, old)
            except FileNotFoundError:
                continue
            shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(new, folder)
            return
        except OSError:
            if not folder.exists():
                raise
    raise OSError(f"{folder} keeps being written by another process")


def write_safetensors(path: Path, entries: dict[str, Tensor], *, read: Callable[[str], Tensor]) -> None:
    """Writes a safetensors file without ever holding more than one tensor.

    The format is the length of a JSON header (8 bytes, little-endian), the header, and the tensors' bytes.

    Args:
        path: The file.
        entries: Shape and dtype of each tensor, on the meta device.
        read: The tensor of a name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in entries.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, expected in entries.items():
            tensor = read(name)
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config of a canonical folder; None where there is none or it is another program's.

    Raises:
        UserError: It is damaged.
    """
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG)
    return config if isinstance(config, dict) and config.get("format") == FORMAT else None


def tokenizer_beside(path: Path) -> Tokenizer | None:
    """The tokenizer that we left beside a file of weights, if we did.

    Raises:
        UserError: Its file is damaged.
    """
    file = path.with_name(TOKENIZER)
    return tokenizer_from_dict(read_json(file)) if file.is_file() else None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


# A file is opened for each tensor: its map counts as memory of this process for as long as it is open.


def layout(path: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of each tensor of a safetensors file, on the meta device.

    Raises:
        UserError: The file is damaged.
    """
    dtypes = {text: dtype for dtype, text in _DTYPES.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: torch.empty(tuple(s.get_shape()), dtype=dtypes[s.get_dtype()], device="meta")
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, KeyError) as error:
        raise unreadable(path, error) from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, in memory of its own.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
