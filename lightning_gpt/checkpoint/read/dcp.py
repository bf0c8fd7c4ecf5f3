"""Read folders of torch.distributed.checkpoint (DCP), as FSDP training writes them: shards, index and header."""

import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lightning_gpt.checkpoint.base import PREFIX, Checkpoint, as_state
from lightning_gpt.checkpoint.read.mapped import read_header, unreadable, untrusted
from lightning_gpt.checksums import IncompleteError, require_manifest
from lightning_gpt.config import UserError

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


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that allows only the classes of an index."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return a class if it is allowed; raise a UserError otherwise."""
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePosixPath  # the path at which the checkpoint was saved; never opened
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise untrusted(self._path, f"{module}.{name}")


class _Reader(FileSystemReader):
    """Torch's reader with an index that we have read, because torch would unpickle any class in it."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self._index


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
        # A key is a path joined by dots, which names of weights also contain; planner_data holds the path.
        for key, (kind, *rest) in self._index.planner_data.items():
            entry = self._index.state_dict_metadata[key]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if kind == "state_dict":
                name = rest[0].removeprefix(PREFIX)
                self._keys[(name,)] = key
                self.stored[name] = tensor
            elif kind == "optimizer_0" and rest[0] == "state":
                name = rest[1].removeprefix(PREFIX)
                self._keys[name, rest[2]] = key
                self.moments.setdefault(name, {})[rest[2]] = tensor
        for shard, size in self._shard_sizes().items():
            file = path / shard
            if not file.is_file() or file.stat().st_size < size:
                problem = "is cut off" if file.is_file() else "is missing"
                raise IncompleteError(f"{path} is incomplete: {shard} {problem}; copy the files of all ranks")

    def _shard_sizes(self) -> dict[str, int]:
        """Return the minimum size in bytes of each file that the index lists."""
        sizes: dict[str, int] = {}
        for info in self._index.storage_data.values():
            sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
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
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                # no_dist: this process reads by itself, even if it is in a process group.
                load({key: tensor}, storage_reader=_Reader(self.path, self._index), no_dist=True)
        except Exception as error:  # a truncated shard raises many errors, some inside of torch's own wrapper
            failures = getattr(error, "failures", None)
            raise unreadable(self.path, next(iter(failures.values()))[0] if failures else error) from error
        return tensor


def _read_index(path: Path, *, trust: bool) -> Metadata:
    """Unpickle the index; unless it is trusted, allow only the classes that an index needs."""
    try:
        with path.open("rb") as file:
            index = (pickle.Unpickler(file) if trust else _IndexUnpickler(file, path)).load()
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise unreadable(path, error) from error
    if not isinstance(index, Metadata) or not isinstance(index.planner_data, dict):
        raise UserError(f"{path} is not the index of a distributed checkpoint")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index
