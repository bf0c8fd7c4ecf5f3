"""Check what a checkpoint says about itself, before any of it is used: its files, its header, its sizes."""

import math
import typing
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.parsing import shown
from lightning_gpt.trust import split_name

_MAX_CONTEXT = 1 << 24  # tokens; no weight need show the context length
_MAX_INTEGER = 1 << 53


def require_contained(path: Path) -> None:
    """Check that no symbolic link inside a checkpoint folder leads out of it; `path` itself may be a link.

    The hub's cache is the exception: a model's ``snapshots/REVISION`` links to ``blobs`` beside ``snapshots``.

    Raises:
        UserError: A link leads out of the folder.
    """
    if not path.is_dir():
        return
    root = path.resolve()
    allowed = root.parent.parent if root.parent.name == "snapshots" else root
    for file in path.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(allowed):
            raise UserError(f"{file} is a symbolic link out of the checkpoint; replace it by the file it should be")


def checked_header(header: Any, *, path: Path) -> dict[str, Any]:
    """Return the header of a checkpoint that train.py wrote, after checking the types of what is used of it.

    Raises:
        UserError: A part is missing or has another type.
    """
    foreign = f"{path} is not a checkpoint that train.py wrote"
    hparams = header.get("hyper_parameters") if isinstance(header, dict) else None
    needed = {"implementation", "model_config"}
    if not isinstance(hparams, dict) or not needed <= hparams.keys() or "global_step" not in header:
        raise UserError(foreign)
    data = header.get("TokenData")
    data = {} if data is None else data
    kinds: tuple[tuple[str, Any, type], ...] = (
        ("implementation", hparams["implementation"], str),
        ("model_config", hparams["model_config"], dict),
        ("optimizer", hparams.get("optimizer", ""), str),
        ("global_step", header["global_step"], int),
        ("TokenData", data, dict),
        ("callbacks", header.get("callbacks", {}), dict),
    )
    for name, value, kind in kinds:
        if type(value) is not kind and not (kind is dict and isinstance(value, dict)):
            raise UserError(f"{foreign}: its {name} is {shown(value)}")
    kinds = (
        ("data", data.get("data"), str),
        ("task", data.get("task"), dict),
        ("tokenizer", data.get("tokenizer"), dict),
        ("consumed_samples", data.get("consumed_samples"), int),
    )
    for name, value, kind in kinds:
        if value is not None and type(value) is not kind:
            raise UserError(f"{foreign}: its {name} is {shown(value)}")
    for name, value in (("global_step", header["global_step"]), ("consumed_samples", data.get("consumed_samples"))):
        if value is not None and not 0 <= value <= _MAX_INTEGER:
            raise UserError(f"{foreign}: its {name} is {shown(value)}")
    if not all(isinstance(name, str) for name in hparams["model_config"]):
        raise UserError(f"{foreign}: its model_config has fields without a name")
    _require_own_files(header.get("callbacks", {}), path=path)
    return header


def _require_own_files(state: Any, *, path: Path) -> None:
    """Check that no path in the state of callbacks climbs out of its folder: ModelCheckpoint deletes such files."""
    if isinstance(state, dict):
        for part in (*state, *state.values()):
            _require_own_files(part, path=path)
    elif isinstance(state, str) and ("://" in state or ".." in PurePath(state).parts):
        raise UserError(f"{path} is not a checkpoint that train.py wrote: its callbacks refer to {shown(state)}")


def require_plausible(
    stored: Mapping[str, Tensor], *, implementation: str, fields: Mapping[str, Any], path: Path
) -> None:
    """Compare the sizes that a built-in model's config declares with the stored weights, without building the model.

    Args:
        stored: The stored weights, of which only shapes are used.
        implementation: Name of the implementation; nothing is compared for another than the built-in ones.
        fields: Its config fields.
        path: The checkpoint, for messages.

    Raises:
        UserError: A field has the wrong type or is larger than the weights allow, or the implementation is unknown.
    """
    if split_name(implementation):
        return  # opening a checkpoint imports no code of its own
    row = get_implementation(implementation)
    damaged = f"{path} does not describe a model of --implementation {implementation}"
    for option in row.config_options():
        value = fields.get(option.name, option.default)
        if not _fits(value, option.type):
            raise UserError(f"{damaged}: its {option.name} is {shown(value)}")
    largest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    limits = {"n_layer": (1, len(stored)), "block_size": (1, _MAX_CONTEXT), "window": (0, _MAX_CONTEXT)}
    limits |= dict.fromkeys(("n_embd", "vocab_size", "n_head", "n_kv_head"), (1, largest)) | {"bigram": (0, largest)}
    for name, (least, most) in limits.items():
        value = fields.get(name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{damaged}: its {name} is {shown(value)}, and the stored weights allow {least} to {most}")


def _fits(value: Any, annotation: Any) -> bool:
    kinds = typing.get_args(annotation) or (annotation,)
    if type(value) is int and float in kinds:
        return abs(value) < _MAX_INTEGER
    return type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value))
