"""The registry of optimizers and their own options. Importing it does not import torch, so that ``--help`` is fast."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_gpt.config import UserError
from lightning_gpt.options import Option, PositiveFloat, options_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class NoOptions:
    """Options of an optimizer that has none of its own."""


@dataclass(frozen=True)
class MuonOptions:
    """Options of Muon, in addition to AdamW's."""

    muon_learning_rate: PositiveFloat = 0.02
    """muon's peak learning rate for matrices, scheduled like learning_rate"""


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """One row of the registry.

    Attributes:
        name: Value of ``--optimizer``.
        build: ``(groups, *, learning_rate, betas, **options) -> Optimizer``.
        options: Dataclass of the options that only this optimizer has. Its fields become flags, and arguments of
            ``GPTModule``.
        hidden: Whether hidden matrices (``Implementation.hidden_matrices``) get parameter groups of their own.
        build_deepspeed: Builder for DeepSpeed's engine, with the further arguments ``fused`` and ``on_host``; None if
            the optimizer does not work under DeepSpeed.
        not_deepspeed: Why it does not, for the error message.
    """

    name: str
    build: "Callable[..., Optimizer]"
    options: type = NoOptions
    hidden: bool = False
    build_deepspeed: "Callable[..., Optimizer] | None" = None
    not_deepspeed: str = ""

    def require_deepspeed(self) -> None:
        """Raise a UserError if the optimizer does not work under DeepSpeed."""
        if self.build_deepspeed is None:
            raise UserError(f"--optimizer {self.name} does not work under DeepSpeed: {self.not_deepspeed}")

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of this optimizer, with defaults for those that are missing or None in ``given``.

        Options of other optimizers, which older checkpoints contain, are ignored.

        Raises:
            TypeError: No optimizer has one of the options.
        """
        for name in given.keys() - {option.name for option in optimizer_options()}:
            raise TypeError(f"GPTModule() got an unexpected keyword argument {name!r}")
        defaults = dataclasses.asdict(self.options())
        return defaults | {name: given[name] for name in defaults if given.get(name) is not None}


def _adamw(groups: Groups, **arguments: Any) -> "Optimizer":
    from lightning_gpt.optim.adamw import adamw

    return adamw(groups, **arguments)


def _deepspeed_adam(groups: Groups, **arguments: Any) -> "Optimizer":
    from lightning_gpt.optim.adamw import deepspeed_adam

    return deepspeed_adam(groups, **arguments)


def _muon(groups: Groups, **arguments: Any) -> "Optimizer":
    from lightning_gpt.optim.muon import Muon

    return Muon(groups, **arguments)


OPTIMIZERS: dict[str, OptimizerRow] = {
    row.name: row
    for row in (
        OptimizerRow(name="adamw", build=_adamw, build_deepspeed=_deepspeed_adam),
        OptimizerRow(
            name="muon",
            build=_muon,
            options=MuonOptions,
            hidden=True,
            not_deepspeed="ZeRO splits the optimizer state into flat pieces, so no rank has a whole matrix;"
            " choose --strategy ddp or fsdp, or --optimizer adamw",
        ),
    )
}


def get_optimizer(name: str) -> OptimizerRow:
    """Return the row of an optimizer.

    Raises:
        UserError: There is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def optimizer_options() -> list[Option]:
    """Return the options of all optimizers, with None as default: the flag is not given."""
    every = [option for row in OPTIMIZERS.values() for option in options_of(row.options)]
    return [
        dataclasses.replace(o, type=o.type | None, default=None, help=f"{o.help} (default: {o.default})") for o in every
    ]


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Check the flags of a run: the optimizer exists, and no option of another one is given.

    Args:
        name: Value of ``--optimizer``.
        given: Values of ``optimizer_options``, by name; None for those not given.

    Raises:
        UserError: The check fails.
    """
    row = get_optimizer(name)
    for other in OPTIMIZERS.values():
        for option in options_of(other.options):
            if other is not row and given.get(option.name) is not None:
                raise UserError(
                    f"--{option.name} is an option of --optimizer {other.name}, not of {row.name}; leave it out, or"
                    f" give --optimizer {other.name}"
                )
