"""What every checkpoint offers, however it is stored: a header, and tensors that are read one at a time."""

import contextlib
import copy
import hashlib
import pickle
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_gpt.config import UserError, cache_root
from lightning_gpt.implementations.registry import get_implementation, refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.tokenizers import Tokenizer, tokenizer_from_dict

PREFIX = "model."  # GPTModule holds the plain model under this name


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one as well: alias to the name met first in the model."""
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(p, name)) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: known for name, known in names if name != known}


def empty_model(implementation: str, *, model_config: dict[str, Any]) -> nn.Module:
    """The plain model with shapes and ties but, where the model lets it be built so, without memory for its weights.

    Raises:
        UserError: The implementation cannot be imported, or refuses its config.
    """
    row = get_implementation(implementation)
    with torch.random.fork_rng(devices=[]):
        # A user's own model may look at its weights while it is built, which fails in any way on the meta device.
        with contextlib.suppress(Exception), torch.device("meta"):
            return row.build(model_config)
        return row.build(model_config)


def meta(tensor: Tensor, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor's shape and dtype without its values."""
    return torch.empty(tuple(tensor.shape) if shape is None else shape, dtype=tensor.dtype, device="meta")


def as_state(value: Tensor | float) -> Tensor:
    """An optimizer's state as a tensor: the step is a float32 scalar, as in torch's AdamW, whoever counted it."""
    return value if isinstance(value, Tensor) and value.dim() else torch.as_tensor(value, dtype=torch.float32)


class Checkpoint(ABC):
    """A checkpoint, read lazily: opening it reads no weights.

    A reader fills in ``stored`` and ``moments`` and the two methods that read. Names are the plain model's.

    Args:
        path: Where it is.
        header: What Lightning saved beside the tensors.

    Attributes:
        kind: What this form is called.
        in_shards: Whether a weight must be put together from the parts of several ranks, which takes time.
        stored: The weights that are stored, as tensors on the meta device; of tied names one, some or all.
        moments: The same for the optimizer's state: name of a weight to name of a state; empty where there is none.

    Raises:
        UserError: The header is not one of ours.
    """

    kind: ClassVar[str]
    in_shards: ClassVar[bool] = False
    stored: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        hparams = header.get("hyper_parameters") if isinstance(header, dict) else None
        needed = {"implementation", "model_config"}
        if not isinstance(hparams, dict) or not needed <= hparams.keys() or "global_step" not in header:
            raise UserError(f"{path} is not a checkpoint that train.py wrote")
        self.path = path
        self.header = header

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """A weight of ``stored``, in full and in memory of its own."""

    @abstractmethod
    def _read_moment(self, name: str, key: str) -> Tensor:
        """A tensor of ``moments``, in full and in memory of its own."""

    @property
    def implementation(self) -> str:
        """The implementation it was trained with."""
        return self.header["hyper_parameters"]["implementation"]

    @property
    def model_config(self) -> dict[str, Any]:
        """The fields of its model's config."""
        return self.header["hyper_parameters"]["model_config"]

    @property
    def optimizer(self) -> str:
        """The optimizer it was trained with."""
        return self.header["hyper_parameters"].get("optimizer", "adamw")  # before there was another

    @property
    def step(self) -> int:
        """Optimizer steps it was trained for."""
        return self.header["global_step"]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer it was trained with, where it knows."""
        stored = self.header.get("TokenData", {}).get("tokenizer")
        return tokenizer_from_dict(stored) if stored else None

    @property
    def data(self) -> str | None:
        """What ``--data`` was, where it knows."""
        return self.header.get("TokenData", {}).get("data")

    @property
    def task_fields(self) -> dict[str, Any]:
        """The fields of the task it was trained on; none where that was a text."""
        return self.header.get("TokenData", {}).get("task") or {}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied names of its model, alias to first name."""
        return tied_names(empty_model(self.implementation, model_config=self.model_config))

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer's state is stored too."""
        return bool(self.moments)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the weights that are stored, by the plain model's names."""
        return {name: tuple(tensor.shape) for name, tensor in self.stored.items()}

    def names(self) -> list[str]:
        """The weights, sorted, a tied one only by its first name."""
        return sorted({self.ties.get(name, name) for name in self.stored})

    def layout(self) -> dict[str, Tensor]:
        """Shape and dtype of each weight of ``names``, on the meta device."""
        first = {self.ties.get(name, name): tensor for name, tensor in self.stored.items()}
        return {name: first[name] for name in self.names()}

    def weight(self, name: str) -> Tensor:
        """One full weight on the CPU, read now; in fp32 where the training had a master copy in fp32.

        Args:
            name: Any of the weight's names.

        Raises:
            UserError: The file is damaged.
        """
        found = self._stored_as(name, self.stored)
        if found is None:
            raise KeyError(name)
        return self._read(found)

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state of one weight, full tensors and 0-dim scalars; empty where there is none.

        Args:
            name: Any of the weight's names.

        Raises:
            UserError: The file is damaged.
        """
        found = self._stored_as(name, self.moments)
        return {} if found is None else {key: self._read_moment(found, key) for key in self.moments[found]}

    def was_trained(self, name: str) -> bool:
        """Whether there is optimizer's state of one weight, by any of its names."""
        return self._stored_as(name, self.moments) is not None

    def moment(self, full_name: str) -> Tensor:
        """One tensor of ``optimizer_state``, named ``WEIGHT/STATE``."""
        name, _, key = full_name.rpartition("/")
        found = self._stored_as(name, self.moments)
        if found is None:
            raise KeyError(full_name)
        return self._read_moment(found, key)

    def _stored_as(self, name: str, stored: dict[str, Any]) -> str | None:
        if name in stored:
            return name
        first = self.ties.get(name, name)
        aliases = [alias for alias, known in self.ties.items() if known == first]
        return next((known for known in (first, *aliases) if known in stored), None)

    def extend_context(self, block_size: int) -> None:
        """Goes on as a checkpoint of the same model with a longer context than it was trained with.

        Args:
            block_size: Its length in tokens.

        Raises:
            UserError: The model does not say that its positions go on (``extends_context``).
        """
        config = self.model_config | {"block_size": block_size}
        if not getattr(empty_model(self.implementation, model_config=config), "extends_context", False):
            raise UserError(
                f"--block_size {block_size}: the positions of --implementation {self.implementation} end at the"
                f" {self.model_config['block_size']} that {self.path} was trained with; give at most that"
            )
        self._change(config)

    def compute_on(self, device_type: str, dtype: torch.dtype) -> None:
        """Goes on as a checkpoint of the same model with options that can compute there, and says so if it changes any.

        Args:
            device_type: "cpu", "cuda" or another.
            dtype: Of its activations.
        """
        model = empty_model(self.implementation, model_config=self.model_config)
        reason, fields = refused_by(model, device_type=device_type, dtype=dtype)
        if reason:
            self._change(self.model_config | fields)
            options = " ".join(f"--{name} {value}" for name, value in fields.items())
            rank_zero_only(print)(f"{self.path}: {reason}; computed with {options}", file=sys.stderr)

    def _change(self, config: dict[str, Any]) -> None:
        self.header = self.header | {"hyper_parameters": self.header["hyper_parameters"] | {"model_config": config}}

    def require_fit(self, module: GPTModule) -> None:
        """Checks that the weights belong into a module, which may lie on the meta device.

        Raises:
            UserError: Another implementation, other parameters or shapes, or tied weights that differ.
        """
        ours = module.hparams["implementation"]
        if ours != self.implementation:
            raise UserError(
                f"{self.path} is a checkpoint of --implementation {self.implementation}, not of {ours}; say the same"
            )
        ties = self.ties  # those of the module do not show once it is on the meta device or sharded
        want = {name: tuple(tensor.shape) for name, tensor in module.model.state_dict().items()}
        have = self.shapes()
        covered = {ties.get(name, name) for name in have}
        for name in sorted(want.keys() | have.keys()):
            if name not in have and ties.get(name, name) in covered:
                continue
            if want.get(name) != have.get(name):
                raise UserError(
                    f"{self.path} does not fit the model: {name} has shape {have.get(name, 'none')} in the checkpoint"
                    f" and {want.get(name, 'none')} in the model; use the sizes it was trained with"
                )
        for first in sorted(set(ties.values())):
            names = [name for name in (first, *(a for a, f in ties.items() if f == first)) if name in have]
            for other in names[1:]:
                if not torch.equal(self._read(names[0]), self._read(other)):
                    raise UserError(
                        f"{self.path} is damaged: {names[0]} and {other} are one weight in the model and differ here"
                    )

    def module(self) -> GPTModule:
        """The trained model on the CPU, filled weight by weight.

        Raises:
            UserError: The weights do not fit the config, or the implementation cannot be imported.
        """
        module = GPTModule(self.implementation, model_config=self.model_config)
        self.require_fit(module)
        ties = tied_names(module.model)
        with torch.no_grad():
            for name, tensor in module.model.state_dict(keep_vars=True).items():
                if name not in ties:
                    tensor.copy_(self.weight(name))
        return module

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under the plain model's names, as torch would save them: tied ones by every name, shared."""
        model = empty_model(self.implementation, model_config=self.model_config)
        kept = {name: self.weight(name) for name in self.names()}
        return {name: kept[self.ties.get(name, name)] for name in model.state_dict()}

    def hash(self) -> str:
        """A sha256 over names, shapes and fp32 values, the same for every form of the same weights."""
        digest = hashlib.sha256()
        for name in self.names():
            weight = self.weight(name).float().contiguous()
            digest.update(f"{name}\0{tuple(weight.shape)}\0".encode())
            digest.update(weight.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class MappedFile:
    """A file of ``torch.save`` whose tensors are mapped, and read when they are copied.

    Args:
        path: The file.
        trust: Whether it may run code while it is read.
        stand_ins: Harmless values for classes that it may hold: pairs of a class and the full name it stands for.
        files: How many files are read in turn, which share what may stay mapped.

    Raises:
        UserError: It is no such file, is damaged, or holds Python objects and is not trusted.
    """

    # Pages that were read count as memory of this process until the map is closed (nanoGPT#287).
    _RENEW_AFTER = 64 * 2**20

    def __init__(
        self, path: Path, *, trust: bool, stand_ins: tuple[tuple[type, str], ...] = (), files: int = 1
    ) -> None:
        self.path = path
        self._trust = trust
        self._stand_ins = stand_ins
        self._renew_after = self._RENEW_AFTER // files
        self._seen = 0
        self._version = self._stat()
        self._content: Any = self._load()

    @property
    def content(self) -> Any:
        """What was saved; keep no tensor of it."""
        if self._content is None:
            if self._stat() != self._version:
                raise UserError(f"{self.path} was replaced while it was read; try again")
            self._content, self._seen = self._load(), 0
        return self._content

    def _stat(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise unreadable(self.path, error) from error
        return stat.st_mtime_ns, stat.st_size

    def read(self, get: Callable[[Any], Tensor]) -> Tensor:
        """A copy of what ``get`` picks from the content, in memory of its own."""
        tensor = get(self.content).detach().clone()
        self._seen += tensor.nbytes
        if self._seen > self._renew_after:
            self._content = None
        return tensor

    def _load(self) -> Any:
        try:
            with torch.serialization.safe_globals(list(self._stand_ins)):
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged bytes fail in any way while they are unpickled
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign and self._trust:
                return torch.load(self.path, map_location="cpu", weights_only=False, mmap=True)
            raise (refusal(self.path, foreign[1]) if foreign else unreadable(self.path, error)) from error


def read_header(path: Path, *, trust: bool) -> Any:
    """A small file of ``torch.save``, as a copy that does not change when the file is written anew.

    Raises:
        UserError: As for ``MappedFile``.
    """
    return copy.deepcopy(MappedFile(path, trust=trust).content)


def refusal(path: Path, name: str) -> UserError:
    """The error of a file that would run code."""
    return UserError(
        f"{path} holds Python objects ({name}), which can run code when they are loaded; give --trust_checkpoint if"
        " you trust who made it"
    )


def unreadable(path: Path, error: Exception) -> UserError:
    """The error of a file that is damaged or something else."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is not a readable checkpoint: {reason}")


def _own_runs() -> Path:
    return cache_root() / "runs.txt"


def remember_run(run_dir: Path) -> None:
    """Notes a run folder as the user's own; a cache that cannot be written forgets it."""
    line = str(run_dir.resolve())
    with contextlib.suppress(OSError):
        file = _own_runs()
        file.parent.mkdir(parents=True, exist_ok=True)
        known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        if line not in known:
            with file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")


def is_own(path: Path) -> bool:
    """Whether a checkpoint lies in a folder that ``remember_run`` noted."""
    try:
        known = _own_runs().read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(path.resolve().is_relative_to(run) for run in known if run)
