"""The registry of optimizers, parameter groups, and the learning-rate schedule."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_gpt.config import OptimOptions, UserError
from lightning_gpt.optim.muon import Muon


def parameter_groups(
    model: nn.Module,
    *,
    decays: Callable[[nn.Module, str], bool],
    weight_decay: float,
    hidden: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Splits a model's parameters into a group that decays and one that does not, and hidden matrices likewise.

    The rule sees the module that owns a parameter and the parameter's name in it, never its shape, which a sharded
    parameter does not show. A tied parameter counts once, where it is met first.

    Args:
        model: The model.
        decays: The implementation's rule.
        weight_decay: Decay of the groups that decay.
        hidden: Names of the parameters that get groups of their own, and the ``parts`` of these groups.
    """
    hidden = hidden or {}
    groups: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            full_name = f"{prefix}.{name}".lstrip(".")
            key = hidden.get(full_name, 0), not decays(module, name)
            groups.setdefault(key, {})[full_name] = parameter
    return [
        {
            "params": list(groups[parts, spared].values()),
            "param_names": list(groups[parts, spared]),
            "weight_decay": 0.0 if spared else weight_decay,
            **({"parts": parts} if parts else {}),
        }
        for parts, spared in sorted(groups)
    ]


def adamw(
    groups: Iterable[dict[str, object]], *, learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW over the groups, in its fused form, which is the fastest on CPU and on GPU alike."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(betas), fused=True)


def deepspeed_adam(
    groups: Iterable[dict[str, object]], *, learning_rate: float, betas: tuple[float, float], fused: bool, on_host: bool
) -> torch.optim.Optimizer:
    """AdamW as DeepSpeed has it: its CPUAdam on the host, its FusedAdam on a GPU, torch's AdamW otherwise.

    FusedAdam is compiled when it is first used, by a CUDA compiler of torch's own version; where that does not work
    out, torch's fused AdamW computes the same.
    """
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        class CPUAdam(DeepSpeedCPUAdam):
            """Frees its native half only itself: Lightning makes passing copies that inherit ``__del__``."""

            def __del__(self) -> None:
                if type(self) is CPUAdam:
                    super().__del__()

        CPUAdam.__name__ = DeepSpeedCPUAdam.__name__
        return CPUAdam(groups, lr=learning_rate, betas=tuple(betas), adamw_mode=True)
    if fused:
        from deepspeed.ops.adam import FusedAdam

        try:
            return FusedAdam(groups, lr=learning_rate, betas=tuple(betas), adam_w_mode=True)
        except Exception as error:  # a missing or unfit compiler fails in many ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"FusedAdam cannot be compiled here ({reason}); torch's fused AdamW is used", stacklevel=2)
    return adamw(groups, learning_rate=learning_rate, betas=betas)


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int | None, final: float) -> float:
    """The factor on the peak learning rate at an optimizer step, counted from 0.

    Rises linearly over ``warmup_steps``, then falls along half a cosine to ``final`` at ``decay_steps`` and stays
    there (the schedule of Loshchilov and Hutter, 2017, without restarts). ``decay_steps=None`` stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay_steps is None:
        return 1.0
    if step >= decay_steps:
        return final
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """One row of the registry.

    Attributes:
        name: What ``--optimizer`` calls it.
        build: ``(groups, learning_rate=, betas=, **options) -> Optimizer``.
        hidden: Whether hidden matrices (see ``Implementation.hidden_matrices``) get groups of their own.
        options: What it alone reads: the flag, which is also the module's argument, and its default.
        build_deepspeed: What DeepSpeed's engine gets, with ``fused`` and ``on_host`` besides; None for nothing.
        not_deepspeed: Why it gets nothing.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    hidden: bool = False
    options: dict[str, float] = field(default_factory=dict)
    build_deepspeed: Callable[..., torch.optim.Optimizer] | None = None
    not_deepspeed: str = ""

    def require_deepspeed(self) -> None:
        """Checks that it works under DeepSpeed.

        Raises:
            UserError: It does not.
        """
        if self.build_deepspeed is None:
            raise UserError(f"--optimizer {self.name} does not work under DeepSpeed: {self.not_deepspeed}")


MUON_LEARNING_RATE = 0.02

OPTIMIZERS: dict[str, OptimizerRow] = {
    row.name: row
    for row in (
        OptimizerRow(name="adamw", build=adamw, build_deepspeed=deepspeed_adam),
        OptimizerRow(
            name="muon",
            build=Muon,
            hidden=True,
            options={"muon_learning_rate": MUON_LEARNING_RATE},
            not_deepspeed="ZeRO cuts the optimizer's state into flat pieces, so that no rank has a whole matrix of it;"
            " choose --strategy ddp or fsdp, or --optimizer adamw",
        ),
    )
}


def get_optimizer(name: str) -> OptimizerRow:
    """The row of an optimizer.

    Raises:
        UserError: There is none of that name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def own_options(options: OptimOptions) -> dict[str, float]:
    """What the options' optimizer alone reads, by name, with defaults filled in.

    Raises:
        UserError: The optimizer is unknown, or an option of another one is given.
    """
    row = get_optimizer(options.optimizer)
    for other in OPTIMIZERS.values():
        for name in other.options.keys() - row.options.keys():
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name} is for --optimizer {other.name}, and this run has {row.name}; leave it out, or give"
                    f" --optimizer {other.name}"
                )
    return {name: default if (v := getattr(options, name)) is None else v for name, default in row.options.items()}
