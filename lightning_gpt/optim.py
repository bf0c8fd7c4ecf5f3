"""Parameter groups, the optimizer, and the learning-rate schedule."""

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, *, decays: Callable[[nn.Module, str], bool], weight_decay: float
) -> list[dict[str, object]]:
    """Splits a model's parameters into one group that decays and one that does not.

    The rule sees the module that owns a parameter and the parameter's name in it, never its shape, which a sharded
    parameter does not show. A tied parameter counts once, where it is met first.

    Args:
        model: The model.
        decays: The implementation's rule.
        weight_decay: Decay of the first group; the second has none.
    """
    decayed: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            (decayed if decays(module, name) else rest)[f"{prefix}.{name}".lstrip(".")] = parameter
    return [
        {"params": list(group.values()), "param_names": list(group), "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (rest, 0.0))
        if group
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
