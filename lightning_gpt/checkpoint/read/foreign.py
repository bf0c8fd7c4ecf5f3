"""Weights of GPT-2's layout that another program wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gpt.checkpoint.architectures.gpt2 import is_transposed
from lightning_gpt.checkpoint.base import Checkpoint, meta
from lightning_gpt.implementations.registry import Implementation
from lightning_gpt.tokenizers import Tokenizer


class ForeignCheckpoint(Checkpoint):
    """Tensors with other names, and perhaps transposed, shown as the model's.

    A subclass opens a file and fills in what follows.

    Args:
        path: Where it is.
        row: The implementation that expresses it.
        fields: The fields of its config.
        names: The model's names of the weights, each with the name that it is stored under.
        tensors: What is stored, on the meta device.
        read: Reads a tensor that is stored, into memory of its own.
        step: Optimizer steps it was trained for.
        tokenizer: The tokenizer it was trained with, where it is known.
        transposed: Whether weights lie as in Hugging Face's GPT-2.
    """

    def __init__(
        self,
        path: Path,
        *,
        row: Implementation,
        fields: dict[str, Any],
        names: dict[str, str],
        tensors: dict[str, Tensor],
        read: Callable[[str], Tensor],
        step: int = 0,
        tokenizer: Tokenizer | None = None,
        transposed: bool = False,
    ) -> None:
        header = {
            "hyper_parameters": {"implementation": row.name, "model_config": fields},
            "global_step": step,
            "TokenData": {"tokenizer": tokenizer.to_dict() if tokenizer else None},
        }
        super().__init__(path, header)
        self._names, self._stored_read, self._transposed = names, read, transposed
        self.stored = {
            name: meta(tensors[key], shape=tuple(reversed(tensors[key].shape)) if self._lies(name) else None)
            for name, key in names.items()
        }
        self.moments = {}

    def _lies(self, name: str) -> bool:
        return self._transposed and is_transposed(name)

    def _read(self, name: str) -> Tensor:
        tensor = self._stored_read(self._names[name])
        return tensor.t().contiguous() if self._lies(name) else tensor

    def _read_moment(self, name: str, key: str) -> Tensor:
        raise KeyError(f"{name}/{key}")
