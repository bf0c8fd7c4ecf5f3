"""Adapt a checkpoint to another model: another implementation, a shorter context, a padded vocabulary."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.checkpoint.architectures import Architecture, architecture_of, holds
from lightning_gpt.checkpoint.base import Checkpoint, empty_model, meta
from lightning_gpt.config import SIZES, UserError
from lightning_gpt.implementations.registry import Implementation, get_implementation

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def fields_for(row: Implementation, source: Checkpoint) -> dict[str, Any]:
    """Return the config fields with which an implementation can hold the weights of a checkpoint.

    Raises:
        UserError: The implementation has another architecture, or hard-codes a setting that does not fit.
    """
    if row.name == source.implementation:
        return dict(source.model_config)
    theirs = get_implementation(source.implementation)
    try:
        architecture = _shared_architecture(row, theirs)
        hf_config = architecture.hf_config(architecture.settings(theirs, source.model_config))
        settings = architecture.settings_from_hf(hf_config)
        if settings.get("tied_head") is False:
            settings["tied_head"] = _is_tied_by_value(source)
        fields = architecture.fields(settings, row=row)
    except ValueError as error:
        raise UserError(f"{source.path} does not fit --implementation {row.name}: {error}") from error
    padding = source.model_config.get("vocab_padding", 0)
    return fields | {"vocab_size": fields["vocab_size"] + padding, "vocab_padding": padding}


def _shared_architecture(row: Implementation, theirs: Implementation) -> Architecture:
    if row.architecture is None or theirs.architecture is None or row.architecture == theirs.architecture:
        architecture_of(row)  # raises for an implementation without one
        return architecture_of(theirs)
    names = [architecture_of(each).name for each in (theirs, row)]
    raise ValueError(f"{theirs.name} has {names[0]}'s layout, and {row.name} {names[1]}'s")


def _is_tied_by_value(source: Checkpoint) -> bool:
    return torch.equal(source.weight(_EMBEDDING), source.weight(_HEAD))


class AdaptedCheckpoint(Checkpoint):
    """The weights of another checkpoint, adapted as they are read; at step 0, without optimizer state.

    - Between implementations of one architecture, missing biases become zeros, and a tied head is copied if the model
      has a separate head.
    - Position embeddings are cropped to a shorter context.
    - Rows added to the vocabulary are the mean of the tokens' rows. Zeros would give logits of 0, far above those of
      GPT-2's tokens (about -30 to -100), and would dominate the softmax. The mean row gives the mean logit: by
      Jensen's inequality the sum of exponentials grows at most by the factor (rows after) / (rows before), and the loss
      by its logarithm. A vocabulary of the same size, padding included, is not changed.

    Args:
        source: The checkpoint to adapt.
        row: The implementation of the model to adapt to.
        fields: Its config fields.

    Raises:
        UserError: The weights do not fit the model.
    """

    def __init__(self, source: Checkpoint, *, row: Implementation, fields: dict[str, Any]) -> None:
        super().__init__(
            source.path,
            {"hyper_parameters": {"implementation": row.name, "model_config": fields}, "global_step": 0},
        )
        self.source, self._row = source, row
        self._theirs = get_implementation(source.implementation)
        self._require_same_model()
        want = empty_model(row.name, model_config=fields).state_dict()
        for name in sorted(want.keys() | {*source.stored} - {*source.ties}):
            have = self._adapted_shape(name)
            shape = tuple(want[name].shape) if name in want else None
            if have != shape and not (have is None and name.endswith(".bias") and self._row.architecture):
                raise UserError(
                    f"{self.path} does not fit the model: {name} has shape {have or 'none'} there and {shape or 'none'}"
                    " in the model; use the options it was trained with"
                )
        self.stored, self.moments = {name: meta(tensor) for name, tensor in want.items()}, {}

    def _require_same_model(self) -> None:
        # Weight shapes do not reveal these differences, or only in terms that a user does not know.
        ours, theirs = self.model_config, self.source.model_config
        for name in SIZES:
            if name in ours and name in theirs and ours[name] != theirs[name]:
                raise UserError(
                    f"--{name} {ours[name]} contradicts {self.path}, whose {name} is {theirs[name]}; leave it out"
                )
        if ours["block_size"] > theirs["block_size"] and self._names_sized_by("block_size"):
            raise UserError(
                f"--block_size {ours['block_size']} is more than {self.path} has; give at most {theirs['block_size']}"
            )
        if self._row.architecture is None or self._row.architecture != self._theirs.architecture:
            if self._row.name != self._theirs.name:
                raise UserError(
                    f"{self.path} was trained with --implementation {self._theirs.name}; its weights do not fit"
                    f" {self._row.name}"
                )
            return
        architecture = architecture_of(self._row)
        want, have = architecture.settings(self._row, ours), architecture.settings(self._theirs, theirs)
        for name in architecture.kept:
            if holds(name, want=want[name], have=have[name]):
                continue
            if name != "tied_head":
                raise UserError(
                    f"{self.path} was trained with --{name} {have[name]}, and --{name} {want[name]} is another model;"
                    " leave it out"
                )
            if not _is_tied_by_value(self.source):
                raise UserError(f"{self.path} has an untied head, and --implementation {self._row.name} has none")

    def _names_sized_by(self, field: str) -> set[str]:
        """Return the source's weights whose size depends on a config field, such as embeddings on ``vocab_size``."""
        config = self.source.model_config
        before, after = (
            empty_model(self._theirs.name, model_config=config | {field: config[field] + more}).state_dict()
            for more in (0, 1)
        )
        return {name for name, tensor in before.items() if tensor.shape != after[name].shape}

    @cached_property
    def _resized_positions(self) -> set[str]:
        same = self.model_config["block_size"] == self.source.model_config["block_size"]
        return set() if same else self._names_sized_by("block_size")

    @cached_property
    def _resized_tokens(self) -> set[str]:
        same = self.model_config["vocab_size"] == self.source.model_config["vocab_size"]
        return set() if same else self._names_sized_by("vocab_size")

    def _adapted_shape(self, name: str) -> tuple[int, ...] | None:
        found = self.source.stored_name(name, self.source.stored)
        if found is None:
            return None
        shape = [*self.source.stored[found].shape]
        if name in self._resized_positions:
            shape[0] = self.model_config["block_size"]
        if name in self._resized_tokens:
            shape[0] = self.model_config["vocab_size"]
        return tuple(shape)

    def _read(self, name: str) -> Tensor:
        if self.source.stored_name(name, self.source.stored) is None:
            return torch.zeros(self.stored[name].shape)
        tensor = self.source.weight(name)
        if name in self._resized_positions:
            tensor = tensor[: self.model_config["block_size"]]
        if name in self._resized_tokens:
            config = self.source.model_config
            tokens = config["vocab_size"] - config.get("vocab_padding", 0)
            tensor = with_rows(tensor[:tokens], self.model_config["vocab_size"])
        return tensor

    def _read_moment(self, name: str, key: str) -> Tensor:
        raise KeyError(f"{name}/{key}")


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Pad a tensor (n, ...) to (rows, ...); each new row is the mean of the others. See ``AdaptedCheckpoint``."""
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape[1:])])
