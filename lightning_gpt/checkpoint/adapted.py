"""One checkpoint shown as another model wants it: other implementation, shorter context, padded vocabulary."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.checkpoint.architectures.gpt2 import fields_from_gpt2, gpt2_config, gpt2_traits
from lightning_gpt.checkpoint.base import Checkpoint, empty_model, meta
from lightning_gpt.config import SIZES, UserError
from lightning_gpt.implementations.registry import Implementation, get_implementation

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def fields_for(row: Implementation, source: Checkpoint) -> dict[str, Any]:
    """The fields of an implementation's config with which it expresses a checkpoint.

    Raises:
        UserError: It cannot.
    """
    if row.name == source.implementation:
        return dict(source.model_config)
    theirs = get_implementation(source.implementation)
    config = gpt2_config(theirs, source.model_config)
    if not config["tie_word_embeddings"]:
        config["tie_word_embeddings"] = _is_tied_by_value(source)
    padding = source.model_config.get("vocab_padding", 0)
    fields = fields_from_gpt2(row, config, source=str(source.path))
    return fields | {"vocab_size": config["vocab_size"] + padding, "vocab_padding": padding}


def _is_tied_by_value(source: Checkpoint) -> bool:
    return torch.equal(source.weight(_EMBEDDING), source.weight(_HEAD))


class AdaptedCheckpoint(Checkpoint):
    """The weights of another checkpoint, at step 0 and without optimizer, translated when they are read.

    - Between implementations of GPT-2's layout biases that are missing are zeros, and a head that is the token
      embedding is copied where the other model has one of its own.
    - Position embeddings are cut to a shorter context.
    - Rows of the vocabulary that are added are the mean of those that stand for tokens. With zeros their logits would
      be 0, far above those of GPT-2's tokens, which are around -30 to -100, and take all of the softmax. With the mean
      their logits are the mean of the logits, so by Jensen's inequality the sum of exponentials grows by at most the
      factor (rows after) / (rows before), and the loss by its logarithm. A vocabulary of the same size, padding
      included, stays as it is.

    Args:
        source: What is shown.
        row: The implementation that wants it.
        fields: The fields of its config.

    Raises:
        UserError: The weights cannot be what the implementation wants.
    """

    def __init__(self, source: Checkpoint, *, row: Implementation, fields: dict[str, Any]) -> None:
        super().__init__(
            source.path,
            {"hyper_parameters": {"implementation": row.name, "model_config": fields}, "global_step": 0},
        )
        self.source, self._row = source, row
        self._theirs = get_implementation(source.implementation)
        self._check_fields()
        want = empty_model(row.name, model_config=fields).state_dict()
        for name in sorted(want.keys() | {*source.stored} - {*source.ties}):
            have = self._source_shape(name)
            shape = tuple(want[name].shape) if name in want else None
            if have != shape and not (have is None and self._is_missing_bias(name)):
                raise UserError(
                    f"{self.path} does not fit the model: {name} has shape {have or 'none'} there and {shape or 'none'}"
                    " in the model; use the options it was trained with"
                )
        self.stored, self.moments = {name: meta(tensor) for name, tensor in want.items()}, {}

    def _check_fields(self) -> None:
        """Refuses what shapes do not show, or would show in words that no user knows."""
        ours, theirs = self.model_config, self.source.model_config
        for name in SIZES:
            if name in ours and name in theirs and ours[name] != theirs[name]:
                raise UserError(
                    f"--{name} {ours[name]} contradicts {self.path}, whose {name} is {theirs[name]}; leave it out"
                )
        if ours["block_size"] > theirs["block_size"] and self._rows_by("block_size"):
            raise UserError(
                f"--block_size {ours['block_size']} is more than {self.path} has, which is {theirs['block_size']}; give"
                " at most that"
            )
        if self._row.gpt2 is None or self._theirs.gpt2 is None:
            if self._row.name != self._theirs.name:
                raise UserError(
                    f"{self.path} was trained with --implementation {self._theirs.name}, and its weights cannot be"
                    f" those of {self._row.name}"
                )
            return
        want, have = gpt2_traits(self._row, ours), gpt2_traits(self._theirs, theirs)
        if want.position != have.position:
            raise UserError(
                f"{self.path} was trained with --position {have.position}, and --position {want.position} is another"
            )
        if want.gelu != have.gelu:
            raise UserError(f"{self.path} was trained with the {have.gelu} GELU, and --gelu {want.gelu} is another")
        if have.bias and not want.bias:
            raise UserError(f"{self.path} has biases, for which a model with --bias false has no place")
        if want.tied and not have.tied and not _is_tied_by_value(self.source):
            raise UserError(f"{self.path} has a head of its own, and --implementation {self._row.name} has none")

    def _is_missing_bias(self, name: str) -> bool:
        return name.endswith(".bias") and self._row.gpt2 is not None and self._theirs.gpt2 is not None

    def _rows_by(self, field: str) -> set[str]:
        """The source's weights that have a row for each token or position: those that grow with the config's field."""
        config = self.source.model_config
        before, after = (
            empty_model(self._theirs.name, model_config=config | {field: config[field] + more}).state_dict()
            for more in (0, 1)
        )
        return {name for name, tensor in before.items() if tensor.shape != after[name].shape}

    @cached_property
    def _positions(self) -> set[str]:
        same = self.model_config["block_size"] == self.source.model_config["block_size"]
        return set() if same else self._rows_by("block_size")

    @cached_property
    def _tokens(self) -> set[str]:
        same = self.model_config["vocab_size"] == self.source.model_config["vocab_size"]
        return set() if same else self._rows_by("vocab_size")

    def _source_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a weight of the source has when it is adapted."""
        found = self.source._stored_as(name, self.source.stored)
        if found is None:
            return None
        shape = [*self.source.stored[found].shape]
        if name in self._positions:
            shape[0] = self.model_config["block_size"]
        if name in self._tokens:
            shape[0] = self.model_config["vocab_size"]
        return tuple(shape)

    def _read(self, name: str) -> Tensor:
        if self.source._stored_as(name, self.source.stored) is None:
            return torch.zeros(self.stored[name].shape)
        tensor = self.source.weight(name)
        if name in self._positions:
            tensor = tensor[: self.model_config["block_size"]]
        if name in self._tokens:
            config = self.source.model_config
            tensor = with_rows(
                tensor[: config["vocab_size"] - config.get("vocab_padding", 0)], self.model_config["vocab_size"]
            )
        return tensor

    def _read_moment(self, name: str, key: str) -> Tensor:
        raise KeyError(f"{name}/{key}")


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with rows of padding added, each the mean of its own rows; see ``AdaptedCheckpoint`` for the reason."""
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape[1:])])
