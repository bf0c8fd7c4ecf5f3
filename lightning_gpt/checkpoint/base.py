"""The interface of checkpoints, whatever their form: a header, and tensors that are read one at a time."""

import contextlib
import hashlib
import math
import sys
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_gpt.checkpoint.header import checked_header
from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import get_implementation, refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.parsing import brief
from lightning_gpt.tokenizers import Tokenizer, tokenizer_from_dict

PREFIX = "model."  # GPTModule holds the plain model under this name


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each alias of a tied parameter to its first name in the model's order."""
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(p, name)) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: known for name, known in names if name != known}


def empty_model(implementation: str, *, model_config: dict[str, Any]) -> nn.Module:
    """Build the plain model, on the meta device if possible, without changing the random state.

    Raises:
        UserError: The implementation cannot be imported, or rejects its config.
    """
    row = get_implementation(implementation)
    with torch.random.fork_rng(devices=[]):
        if row.builtin:
            try:
                return row.build(model_config, meta=True)
            except UserError:
                raise
            except Exception as error:  # sizes from a damaged header: division by zero, overflow
                raise UserError(f"--implementation {implementation} has no such model: {brief(error)}") from error
        # A user's model may read its weights while it is built, which can raise anything on the meta device.
        with contextlib.suppress(Exception), torch.device("meta"):
            return row.build(model_config)
        return row.build(model_config)


def meta(tensor: Tensor, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor on the meta device with the same dtype, and the same shape or `shape`."""
    return torch.empty(tuple(tensor.shape) if shape is None else shape, dtype=tensor.dtype, device="meta")


def as_state(value: Tensor | float) -> Tensor:
    """Return optimizer state as a tensor. Scalars, such as the step, become 0-dim float32, as in torch's AdamW."""
    return value if isinstance(value, Tensor) and value.dim() else torch.as_tensor(value, dtype=torch.float32)


class Checkpoint(ABC):
    """A checkpoint that is read lazily: opening it reads no weights.

    A reader sets ``stored`` and ``moments`` and implements the two methods that read. Names are the plain model's.

    Args:
        path: The file or folder.
        header: Content of Lightning's checkpoint without the tensors.

    Attributes:
        kind: Name of this form, for messages.
        in_shards: Whether weights are assembled from the parts of several ranks, which is slow.
        stored: The stored weights on the meta device, by name; tied weights under one or more of their names.
        moments: The stored optimizer state on the meta device, by weight and state name; empty if there is none.
        has_average: Whether the stored weights are an average of those that training continues from (``--ema``).
        trusted: Whether the user trusts it or made it, so that it may name code.
        settings: Settings of the run in nanoGPT's ``ckpt.pt``, under its names; empty for all others.
        dataset: Token folder of that run, if it is found.

    Raises:
        UserError: The header is not one of ours.
    """

    kind: ClassVar[str]
    in_shards: ClassVar[bool] = False
    stored: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    has_average: bool = False
    trusted: bool = False
    dataset: Path | None = None

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.header = checked_header(header, path=path)

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read a weight of ``stored`` in full; return a copy that does not share the file's memory."""

    @abstractmethod
    def _read_moment(self, name: str, key: str) -> Tensor:
        """Read a tensor of ``moments`` in full; return a copy that does not share the file's memory."""

    # Header

    @property
    def implementation(self) -> str:
        """Name of the implementation that was trained."""
        return self.header["hyper_parameters"]["implementation"]

    @property
    def model_config(self) -> dict[str, Any]:
        """Config fields of the model."""
        return self.header["hyper_parameters"]["model_config"]

    @property
    def optimizer(self) -> str:
        """Name of the optimizer; AdamW in older checkpoints, which do not store it."""
        return self.header["hyper_parameters"].get("optimizer", "adamw")

    @property
    def step(self) -> int:
        """Number of optimizer steps trained."""
        return self.header["global_step"]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the training data; None if unknown."""
        stored = self._data.get("tokenizer")
        return tokenizer_from_dict(stored) if stored else None

    @property
    def data(self) -> str | None:
        """The value of ``--data``; None if unknown."""
        return self._data.get("data")

    @property
    def task_fields(self) -> dict[str, Any]:
        """Fields of the task that was trained; empty for text."""
        return self._data.get("task") or {}

    @property
    def _data(self) -> dict[str, Any]:
        return self.header.get("TokenData") or {}

    @property
    def best_loss(self) -> float:
        """Lowest validation loss of the run up to this step; infinity if unknown."""
        states = self.header.get("callbacks", {}).items()
        losses = [state.get("best_model_score") for key, state in states if "'monitor': 'val_loss'" in key]
        return min((float(loss) for loss in losses if loss is not None), default=math.inf)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied names of the model: alias to first name."""
        return tied_names(empty_model(self.implementation, model_config=self.model_config))

    @property
    def has_optimizer(self) -> bool:
        """Whether optimizer state is stored."""
        return bool(self.moments)

    # Tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of each stored weight."""
        return {name: tuple(tensor.shape) for name, tensor in self.stored.items()}

    def names(self) -> list[str]:
        """Return the names of the weights, sorted; tied weights only under their first name."""
        return sorted({self.ties.get(name, name) for name in self.stored})

    def layout(self) -> dict[str, Tensor]:
        """Return each weight of ``names`` on the meta device."""
        first = {self.ties.get(name, name): tensor for name, tensor in self.stored.items()}
        return {name: first[name] for name in self.names()}

    def weight(self, name: str) -> Tensor:
        """Read one full weight to the CPU; float32 if training kept a float32 master copy.

        Args:
            name: Any of the weight's names.

        Raises:
            KeyError: There is no such weight.
            UserError: The file is damaged.
        """
        found = self.stored_name(name, self.stored)
        if found is None:
            raise KeyError(name)
        return self._read(found)

    def trained_weight(self, name: str) -> Tensor:
        """Do the same as ``weight`` for the weights that training continues from, which may not be the stored average.

        Args:
            name: Any of the weight's names.
        """
        return self.weight(name)

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """Read the optimizer state of one weight: full tensors and 0-dim scalars; empty if there is none.

        Args:
            name: Any of the weight's names.

        Raises:
            UserError: The file is damaged.
        """
        found = self.stored_name(name, self.moments)
        return {} if found is None else {key: self._read_moment(found, key) for key in self.moments[found]}

    def was_trained(self, name: str) -> bool:
        """Return whether there is optimizer state for a weight, given any of its names."""
        return self.stored_name(name, self.moments) is not None

    def moment(self, full_name: str) -> Tensor:
        """Read one tensor of optimizer state, named ``WEIGHT/STATE``.

        Raises:
            KeyError: There is no such state.
            UserError: The file is damaged.
        """
        name, _, key = full_name.rpartition("/")
        found = self.stored_name(name, self.moments)
        if found is None:
            raise KeyError(full_name)
        return self._read_moment(found, key)

    def stored_name(self, name: str, stored: dict[str, Any]) -> str | None:
        """Return the name under which `stored` holds a weight, given any of its names; None if it does not."""
        if name in stored:
            return name
        first = self.ties.get(name, name)
        aliases = [alias for alias, known in self.ties.items() if known == first]
        return next((known for known in (first, *aliases) if known in stored), None)

    # Changes of the config

    def extend_context(self, block_size: int) -> None:
        """Override block_size with a larger one.

        Args:
            block_size: Context length in tokens.

        Raises:
            UserError: The model's positions end at the length it was trained with (no ``extends_context``).
        """
        config = self.model_config | {"block_size": block_size}
        if not getattr(empty_model(self.implementation, model_config=config), "extends_context", False):
            raise UserError(
                f"--block_size {block_size}: positions of --implementation {self.implementation} end at the"
                f" {self.model_config['block_size']} that {self.path} was trained with; give at most that"
            )
        self._override_config(config)

    def compute_on(self, device_type: str, dtype: torch.dtype) -> None:
        """Override config fields that do not work on a kind of device and dtype, and print a note on stderr.

        Args:
            device_type: "cpu", "cuda" or another.
            dtype: Dtype of the activations.
        """
        model = empty_model(self.implementation, model_config=self.model_config)
        reason, fields = refused_by(model, device_type=device_type, dtype=dtype)
        if reason:
            self._override_config(self.model_config | fields)
            options = " ".join(f"--{name} {value}" for name, value in fields.items())
            rank_zero_only(print)(f"{self.path}: {reason}; computed with {options}", file=sys.stderr)

    def _override_config(self, config: dict[str, Any]) -> None:
        self.header = self.header | {"hyper_parameters": self.header["hyper_parameters"] | {"model_config": config}}

    # The whole model

    def require_fit(self, module: GPTModule) -> None:
        """Check that the weights fit a module, which may be on the meta device.

        Raises:
            UserError: The module has another implementation, other parameters or shapes, or the checkpoint holds
                different values for a tied weight.
        """
        ours = module.hparams["implementation"]
        if ours != self.implementation:
            raise UserError(
                f"{self.path} is a checkpoint of --implementation {self.implementation}, not of {ours}; give the same"
            )
        ties = self.ties  # a sharded or meta-device module does not show its own
        want = {name: tuple(tensor.shape) for name, tensor in module.model.state_dict().items()}
        have = self.shapes()
        for name in sorted(want.keys() | have.keys()):
            shape = have.get(self.stored_name(name, self.stored) or name)
            if want.get(name) != shape:
                raise UserError(
                    f"{self.path} does not fit the model: {name} has shape {'none' if shape is None else shape} in the"
                    f" checkpoint and {want.get(name, 'none')} in the model; use the sizes it was trained with"
                )
        for first in sorted(set(ties.values())):
            names = [name for name in (first, *(a for a, f in ties.items() if f == first)) if name in have]
            for other in names[1:]:
                if not torch.equal(self._read(names[0]), self._read(other)):
                    raise UserError(
                        f"{self.path} is damaged: {names[0]} and {other} are one weight in the model and differ here"
                    )

    def module(self) -> GPTModule:
        """Build the trained model on the CPU and fill it weight by weight.

        Raises:
            UserError: The weights do not fit the config, or the implementation cannot be imported.
        """
        self.require_fit(GPTModule.without_memory(self.implementation, model_config=self.model_config))
        module = GPTModule(self.implementation, model_config=self.model_config)
        ties = tied_names(module.model)
        with torch.no_grad():
            for name, tensor in module.model.state_dict(keep_vars=True).items():
                if name not in ties:
                    tensor.copy_(self.weight(name))
        return module

    def state_dict(self) -> dict[str, Tensor]:
        """Read all weights into the plain model's state dict; tied names share one tensor."""
        model = empty_model(self.implementation, model_config=self.model_config)
        kept = {name: self.weight(name) for name in self.names()}
        return {name: kept[self.ties.get(name, name)] for name in model.state_dict()}

    def hash(self) -> str:
        """Return a sha256 of names, shapes and float32 values, the same for all forms of the same weights."""
        digest = hashlib.sha256()
        for name in self.names():
            weight = self.weight(name).float().contiguous()
            digest.update(f"{name}\0{tuple(weight.shape)}\0".encode())
            digest.update(raw_bytes(weight))
        return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
