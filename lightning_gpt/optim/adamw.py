"""AdamW, from torch and from DeepSpeed."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch


def adamw(
    groups: Iterable[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, its fastest form on CPUs and GPUs."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), fused=True)


def deepspeed_adam(
    groups: Iterable[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float], fused: bool, on_host: bool
) -> torch.optim.Optimizer:
    """Return the fastest AdamW under DeepSpeed.

    FusedAdam is compiled on first use, which needs a compiler of torch's CUDA version. If that fails, warn and return
    torch's fused AdamW, which computes the same.

    Args:
        groups: Parameter groups.
        learning_rate: Learning rate of all groups.
        betas: Decay rates of the moments.
        fused: Whether to use DeepSpeed's FusedAdam, which needs a GPU.
        on_host: Whether to use DeepSpeed's CPUAdam, for optimizer state in host memory.
    """
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        class CPUAdam(DeepSpeedCPUAdam):
            """CPUAdam that frees its native state once: Lightning makes temporary copies, which inherit ``__del__``."""

            def __del__(self) -> None:
                if type(self) is CPUAdam:
                    super().__del__()

        CPUAdam.__name__ = DeepSpeedCPUAdam.__name__
        return CPUAdam(groups, lr=learning_rate, betas=betas, adamw_mode=True)
    if fused:
        from deepspeed.ops.adam import FusedAdam

        try:
            return FusedAdam(groups, lr=learning_rate, betas=betas, adam_w_mode=True)
        except Exception as error:  # a missing or unsuitable compiler fails in many ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"FusedAdam cannot be compiled here ({reason}); torch's fused AdamW is used", stacklevel=2)
    return adamw(groups, learning_rate=learning_rate, betas=betas)
