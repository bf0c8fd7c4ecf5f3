"""The registry of Hugging Face architectures that can be read and written: one adapter file and one row each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gpt.checkpoint.architectures.base import Architecture, holds
from lightning_gpt.checkpoint.architectures.gpt2 import GPT2
from lightning_gpt.checkpoint.architectures.nanochat import NanoChat
from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import Implementation

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "get_architecture", "holds", "to_hugging_face"]

ARCHITECTURES: dict[str, Architecture] = {adapter.model_type: adapter for adapter in (GPT2(), NanoChat())}


def get_architecture(model_type: str, *, source: Path) -> Architecture:
    """Return the adapter of a Hugging Face ``model_type``.

    Args:
        model_type: From a ``config.json``.
        source: The folder, for the error message.

    Raises:
        UserError: There is none.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{source}: model_type {model_type} is not supported; these are: {known}")
    return ARCHITECTURES[model_type]


def architecture_of(row: Implementation) -> Architecture:
    """Return the adapter of an implementation.

    Raises:
        UserError: The implementation has no counterpart at Hugging Face.
    """
    if row.architecture is None:
        known = " or ".join(f"{adapter.name}'s" for adapter in ARCHITECTURES.values())
        raise UserError(f"--implementation {row.name} does not have {known} layout")
    return ARCHITECTURES[row.architecture]


def to_hugging_face(
    row: Implementation, *, fields: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a model to transformers.

    Args:
        row: The model's implementation.
        fields: Its config fields.
        state_dict: Its weights, by our names.

    Returns:
        The content of ``config.json`` and the state dict of the same model in transformers.

    Raises:
        ValueError: Hugging Face has no such model.
    """
    architecture = architecture_of(row)
    layout, read = architecture.exported(state_dict, state_dict.__getitem__)
    return architecture.hf_config(architecture.settings(row, fields)), {name: read(name) for name in layout}
