"""Read DeepSpeed's folder, in which each rank stores its part of the float32 weights and the optimizer state.

``checkpoint/`` holds two kinds of files. The model states hold Lightning's header, buffers, and the shapes and order of
the parameters. Each rank's optimizer states hold flat tensors, one for each parameter group (ZeRO 1 and 2) or sub-group
(ZeRO 3), and the optimizer's moments in the same layout. ZeRO 1 and 2 split the flat tensor of a whole group into one
part for each rank, and record where each piece of a parameter is. ZeRO 3 splits each parameter into one piece for each
rank, all of the same length except the last ones, and stores a rank's pieces one after another.

Reading does not need DeepSpeed: stand-ins replace its few classes that are pickled in these files.
"""

import contextlib
import copy
import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.checkpoint.base import PREFIX, Checkpoint, as_state, meta
from lightning_gpt.checkpoint.read.mapped import MappedFile, enum_member
from lightning_gpt.checksums import IncompleteError, require_manifest
from lightning_gpt.config import UserError
from lightning_gpt.parsing import brief

FOLDER = "checkpoint"
_MODEL_STATES_OF_RANK = "zero_pp_rank_%d_mp_rank_00_model_states.pt"

# Keys that DeepSpeed adds to the client state, which here is Lightning's header.
_NOT_HEADER = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "universal_checkpoint_info",
    "ds_config",
    "ds_version",
}


class _LossScaler:
    """Stand-in for DeepSpeed's loss scalers, which are not used here."""


class _ZeroStage(enum.IntEnum):
    """Stand-in for DeepSpeed's ``ZeroStageEnum``, whose value is not used here."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = max_stage = 3


@dataclass
class _Fragment:
    """Stand-in for DeepSpeed's ``fragment_address``: where a piece of a parameter is in a rank's flat tensor."""

    numel: int
    start: int


_STAND_INS: tuple[tuple[Callable[..., Any], str], ...] = (
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (enum_member, "builtins.getattr"),
    (enum_member, "__builtin__.getattr"),
)


@dataclass(frozen=True)
class _Piece:
    """A rank's piece of a parameter: `numel` elements of its flat tensor, from `start`."""

    rank: int
    start: int
    numel: int


class DeepSpeedCheckpoint(Checkpoint):
    """A folder that ``DeepSpeedStrategy.save_checkpoint`` wrote, from any ZeRO stage and number of ranks.

    Args:
        path: The folder.
        trust: Whether its files may hold Python objects.

    Raises:
        UserError: It is not one of our checkpoints, is damaged or incomplete, or holds untrusted Python objects.
    """

    kind = "DeepSpeed"
    in_shards = True

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        self._trust = trust
        self._model = MappedFile(_model_states(path), trust=trust, stand_ins=_STAND_INS)
        self._models = [self._model]  # of all ranks, if stage 3 has frozen parameters
        self._frozen: dict[str, str] = {}
        states = self._model.content
        if not isinstance(states, dict) or not {"module", "param_shapes", "shared_params"} <= states.keys():
            raise UserError(f"{self._model.path} does not hold the model states of a ZeRO checkpoint")
        super().__init__(path, copy.deepcopy({k: v for k, v in states.items() if k not in _NOT_HEADER}))
        require_manifest(path, self.header)
        self._ranks = _open_ranks(path, trust=trust)
        try:
            self._lay_out(states)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not have the layout of a DeepSpeed checkpoint that this program knows: {error!r}"
            ) from error

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether the subfolder holds DeepSpeed's files."""
        return any((path / FOLDER).glob("*_states.pt"))

    def _lay_out(self, states: dict[str, Any]) -> None:
        """Find the place of each tensor, from the shapes."""
        shapes: list[dict[str, torch.Size]] = states["param_shapes"]
        parts = [rank.content["optimizer_state_dict"] for rank in self._ranks]
        self._is_stage_3 = "fp32_flat_groups" in parts[0]
        self.stored, self.moments = {}, {}
        self._group: dict[str, int] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        if len(shapes) != len(self._flat_weights(parts[0])):
            raise UserError(
                f"{self.path} is damaged: {len(shapes)} parameter groups have shapes, and a different number weights"
            )
        for group, named in enumerate(shapes):
            cut = [self._cut(part, group, named, rank) for rank, part in enumerate(parts)]
            flat = self._flat_weights(parts[0])[group]
            state = self._state(parts[0], group)
            for full_name, shape in named.items():
                name = full_name.removeprefix(PREFIX)
                pieces = [pieces[full_name] for pieces in cut if full_name in pieces]
                if sum(piece.numel for piece in pieces) != math.prod(shape):
                    raise UserError(f"{self.path} is damaged: parts of {name} are missing")
                self._group[name], self._pieces[name] = group, pieces
                self.stored[name] = meta(flat, shape=tuple(shape))
                if state:
                    self.moments[name] = {
                        key: meta(value, shape=tuple(shape)) if value.dim() else meta(value)
                        for key, value in state.items()
                    }
        # Buffers, and under ZeRO 1 and 2 frozen parameters.
        whole = states["buffer_names"] if self._is_stage_3 else states["module"]
        for full_name in whole:
            name = full_name.removeprefix(PREFIX)
            if name not in self.stored and full_name not in states["shared_params"]:
                self.stored[name] = meta(states["module"][full_name])
        if self._is_stage_3:
            self._lay_out_frozen(states)

    def _lay_out_frozen(self, states: dict[str, Any]) -> None:
        """Find frozen parameters, whose pieces stage 3 stores in each rank's model states."""
        shapes = states.get("frozen_param_shapes") or {}
        self._frozen = {name.removeprefix(PREFIX): name for name in shapes}
        if not shapes:
            return
        for rank in range(1, len(self._ranks)):
            path = self._model.path.with_name(_MODEL_STATES_OF_RANK % rank)
            if not path.is_file():
                raise IncompleteError(
                    f"{self.path} is incomplete: {FOLDER}/{path.name} is missing; copy the files of all ranks"
                )
            self._models.append(MappedFile(path, trust=self._trust, stand_ins=_STAND_INS, files=len(self._ranks)))
        for name, full_name in self._frozen.items():
            fragment = states["frozen_param_fragments"][full_name]
            self.stored[name] = meta(fragment, shape=tuple(shapes[full_name]))

    def _cut(self, part: dict[str, Any], group: int, named: dict[str, torch.Size], rank: int) -> dict[str, _Piece]:
        """Return a rank's pieces of a group's parameters."""
        if not self._is_stage_3:
            fragments = part["param_slice_mappings"][group]
            pieces = {name: _Piece(rank, found.start, found.numel) for name, found in fragments.items()}
        else:
            pieces, start = {}, 0
            for name, shape in named.items():
                numel = math.prod(shape)
                length = math.ceil(numel / len(self._ranks))
                pieces[name] = _Piece(rank, start, max(0, min(length, numel - rank * length)))
                start += length
        available = self._flat_weights(part)[group].numel()
        if any(piece.start + piece.numel > available for piece in pieces.values() if piece.numel):
            raise UserError(f"{self.path} is damaged: rank {rank}'s weights are too few for their shapes")
        return pieces

    def _flat_weights(self, part: dict[str, Any]) -> list[Tensor]:
        return part["fp32_flat_groups" if self._is_stage_3 else "single_partition_of_fp32_groups"]

    def _state(self, part: dict[str, Any], group: int) -> dict[str, Tensor]:
        """Return the optimizer state of a flat tensor. Some optimizers keep the step in the parameter group."""
        optimizer = part["optimizer_state_dict" if self._is_stage_3 else "base_optimizer_state"]
        state = optimizer["state"].get(group, {})
        settings = next(g for g in optimizer["param_groups"] if group in g["params"])
        step = {"step": settings["step"]} if state and "step" in settings else {}
        return {key: as_state(value) for key, value in (step | state).items()}

    def _read(self, name: str) -> Tensor:
        with self._reporting_damage():
            return self._read_weight(name)

    def _read_weight(self, name: str) -> Tensor:
        if name in self._group:
            return self._join(name, self.stored[name], lambda part: self._flat_weights(part)[self._group[name]])
        if name in self._frozen:
            fragments = [
                file.read(lambda content: content["frozen_param_fragments"][self._frozen[name]])
                for file in self._models
            ]
            like = self.stored[name]
            return torch.cat([fragment.flatten() for fragment in fragments])[: like.numel()].view(like.shape)
        key = next(k for k in (PREFIX + name, name) if k in self._model.content["module"])
        return self._model.read(lambda content: content["module"][key])

    def _read_moment(self, name: str, key: str) -> Tensor:
        group = self._group[name]
        with self._reporting_damage():
            state = self._state(self._ranks[0].content["optimizer_state_dict"], group)[key]
            if state.dim() == 0:
                return state.clone()
            return self._join(name, self.moments[name][key], lambda part: self._state(part, group)[key])

    @contextlib.contextmanager
    def _reporting_damage(self) -> Iterator[None]:
        """Turn what a rank's file raises, of which only sizes were checked before, into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # damaged bytes can raise anything
            raise UserError(f"{self.path} is damaged: {brief(error)}") from error

    def _join(self, name: str, like: Tensor, flat: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Assemble a full tensor from the pieces in each rank's flat tensor, which `flat` picks."""

        def pick(piece: slice, content: Any) -> Tensor:
            return flat(content["optimizer_state_dict"])[piece]

        joined = torch.empty(like.numel(), dtype=like.dtype)
        end = 0
        for piece in self._pieces[name]:
            start, end = end, end + piece.numel
            of_rank = slice(piece.start, piece.start + piece.numel)
            joined[start:end] = self._ranks[piece.rank].read(partial(pick, of_rank))
        return joined.view(like.shape)


def _model_states(path: Path) -> Path:
    names = ("mp_rank_00_model_states.pt", _MODEL_STATES_OF_RANK % 0)
    found = [path / FOLDER / name for name in names if (path / FOLDER / name).is_file()]
    if not found:
        raise IncompleteError(
            f"{path} is incomplete: {FOLDER}/*_model_states.pt of rank 0 is missing; copy the whole folder"
        )
    return found[0]


def _open_ranks(path: Path, *, trust: bool) -> list[MappedFile]:
    """Open the files of all ranks, in order, ignoring files of further ranks that an earlier save left.

    Raises:
        UserError: A file is missing, damaged or not trusted.
    """
    names = [f"{kind}zero_pp_rank_%d_mp_rank_00_optim_states.pt" for kind in ("", "bf16_")]
    found = [name for name in names if (path / FOLDER / (name % 0)).is_file()]
    if len(found) > 1:
        raise UserError(f"{path} holds the files of two runs, in bf16 and in another precision; delete those of one")
    name = found[0] if found else names[0]
    files: list[MappedFile] = []
    ranks = 1
    while len(files) < ranks:
        file = path / FOLDER / (name % len(files))
        if not file.is_file():
            raise IncompleteError(f"{path} is incomplete: {FOLDER}/{file.name} is missing; copy the files of all ranks")
        files.append(MappedFile(file, trust=trust, stand_ins=_STAND_INS, files=ranks))
        try:
            count = files[-1].content["optimizer_state_dict"]["partition_count"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} does not hold the optimizer states of a ZeRO checkpoint") from error
        here = max(count) if isinstance(count, list) else count
        if len(files) > 1 and here != ranks:
            raise UserError(f"{path} is damaged: {file.name} was saved by {here} ranks, rank 0's file by {ranks}")
        ranks = here
    return files
