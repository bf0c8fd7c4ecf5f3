"""Read folders of torch.distributed.checkpoint (DCP), as FSDP training writes them: shards, index and header."""

import importlib
import math
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lightning_gpt.checkpoint.base import PREFIX, Checkpoint, as_state
from lightning_gpt.checkpoint.read.mapped import enum_member, load_slice, read_header, unreadable, untrusted
from lightning_gpt.checksums import IncompleteError, require_manifest
from lightning_gpt.config import UserError
from lightning_gpt.parsing import StrictUnpickler

INDEX, HEADER = ".metadata", "meta.pt"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


class _IndexUnpickler(StrictUnpickler):
    """An unpickler that allows only the classes of an index."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return a class if it is allowed; raise a UserError otherwise."""
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePosixPath  # the path at which the checkpoint was saved; never opened
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return enum_member
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(importlib.import_module(module), name)
        raise untrusted(self._path, f"{module}.{name}")


class DcpCheckpoint(Checkpoint):
    """A folder that ``ModelParallelStrategy.save_checkpoint`` wrote, from any number of ranks.

    Args:
        path: The folder.
        trust: Whether its index and header may hold Python objects.

    Raises:
        UserError: It is not one of our checkpoints, is damaged, or holds Python objects and is not trusted.
    """

    kind = "FSDP"
    in_shards = True

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        self._index = _read_index(path / INDEX, trust=trust)
        super().__init__(path, read_header(path / HEADER, trust=trust))
        require_manifest(path, self.header)
        self.stored = {}
        self.moments = {}
        self._keys: dict[tuple[str, ...], str] = {}
        self._entries: dict[str, TensorStorageMetadata] = {}
        # A key is a path joined by dots, which names of weights also contain; planner_data holds the path.
        for key, (kind, *rest) in self._index.planner_data.items():
            entry = self._index.state_dict_metadata[key]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self._entries[key] = entry
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if kind == "state_dict":
                name = rest[0].removeprefix(PREFIX)
                self._keys[(name,)] = key
                self.stored[name] = tensor
            elif kind == "optimizer_0" and rest[0] == "state":
                name = rest[1].removeprefix(PREFIX)
                self._keys[name, rest[2]] = key
                self.moments.setdefault(name, {})[rest[2]] = tensor
        for key in self._keys.values():
            self._require_whole(key)
        for shard, size in self._shard_sizes().items():
            file = path / shard
            if not file.is_file() or file.stat().st_size < size:
                problem = "is cut off" if file.is_file() else "is missing"
                raise IncompleteError(f"{path} is incomplete: {shard} {problem}; copy the files of all ranks")

    def _require_whole(self, key: str) -> None:
        """Check that the stored chunks of a tensor fill it."""
        entry = self._entries[key]
        itemsize = entry.properties.dtype.itemsize
        inside = stored = True
        count = 0
        for chunk in entry.chunks:
            bounds = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            inside = inside and all(0 <= offset <= offset + size <= whole for offset, size, whole in bounds)
            numel = math.prod(chunk.sizes)
            stored = stored and self._place(key, chunk).length >= numel * itemsize
            count += numel
        if not (inside and stored) or count != math.prod(entry.size):
            raise UserError(f"{self.path} is damaged: parts of {key} are missing")

    def _place(self, key: str, chunk: ChunkStorageMetadata) -> Any:
        return self._index.storage_data[MetadataIndex(key, chunk.offsets)]

    def _shard_sizes(self) -> dict[str, int]:
        """Return the minimum size in bytes of each file that the index lists."""
        sizes: dict[str, int] = {}
        for info in self._index.storage_data.values():
            name, numbers = info.relative_path, (info.offset, info.length)
            if PurePosixPath(name).name != name or any(type(n) is not int or n < 0 for n in numbers):
                raise UserError(f"{self.path / INDEX} does not list files in its own folder")
            sizes[name] = max(sizes.get(name, 0), sum(numbers))
        return sizes

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a folder holds an index and a header."""
        return (path / INDEX).is_file() and (path / HEADER).is_file()

    def _read(self, name: str) -> Tensor:
        return self._load(self._keys[(name,)], self.stored[name])

    def _read_moment(self, name: str, key: str) -> Tensor:
        return as_state(self._load(self._keys[name, key], self.moments[name][key]))

    def _load(self, key: str, like: Tensor) -> Tensor:
        tensor = torch.empty_like(like, device="cpu")
        for chunk in self._entries[key].chunks:
            info = self._place(key, chunk)
            part = load_slice(self.path / info.relative_path, start=info.offset, length=info.length)
            if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != tensor.dtype:
                raise UserError(f"{self.path} is damaged: {info.relative_path} does not hold {key} where it should")
            tensor[tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return tensor


def _read_index(path: Path, *, trust: bool) -> Metadata:
    """Unpickle the index; unless it is trusted, allow only the classes that an index needs."""
    try:
        index = pickle.loads(path.read_bytes()) if trust else _IndexUnpickler(path).load()
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise unreadable(path, error) from error
    if not isinstance(index, Metadata) or not isinstance(index.planner_data, dict):
        raise UserError(f"{path} is not the index of a distributed checkpoint")
    return index
