"""Checkpoints that other programs wrote, with the weights under our names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gpt.checkpoint.architectures.base import Read
from lightning_gpt.checkpoint.base import Checkpoint
from lightning_gpt.implementations.registry import Implementation
from lightning_gpt.tokenizers import Tokenizer


class ForeignCheckpoint(Checkpoint):
    """A checkpoint whose weights an adapter has translated. A subclass opens the file.

    Args:
        path: The file or folder.
        row: The implementation that holds the weights.
        fields: Its config fields.
        stored: The weights on the meta device, by our names.
        read: Returns a copy of one of them.
        step: Optimizer steps that the weights were trained for.
        tokenizer: The tokenizer they were trained with, if known.
        header: Further parts of the header; those of ``hyper_parameters`` are added to the ones above.
    """

    def __init__(
        self,
        path: Path,
        *,
        row: Implementation,
        fields: dict[str, Any],
        stored: dict[str, Tensor],
        read: Read,
        step: int = 0,
        tokenizer: Tokenizer | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        more = dict(header or {})
        hparams = more.pop("hyper_parameters", {})
        data = {"tokenizer": tokenizer.to_dict() if tokenizer else None} | more.pop("TokenData", {})
        names_model = {"implementation": row.name, "model_config": fields}
        super().__init__(
            path, {"hyper_parameters": hparams | names_model, "global_step": step, "TokenData": data, **more}
        )
        self._read_stored = read
        self.stored, self.moments = stored, {}

    def _read(self, name: str) -> Tensor:
        return self._read_stored(name)

    def _read_moment(self, name: str, key: str) -> Tensor:
        raise KeyError(f"{name}/{key}")
