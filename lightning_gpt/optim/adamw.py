"""AdamW, from torch and from DeepSpeed."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with a flag on the device that skips a step without the host knowing of it.

    Attributes:
        skip: Float32 scalar on the parameters' device: 1 leaves weights, moments and step counts as they are, 0 does
            not. None never skips. It is read after the closure has run.
    """

    skip: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step and return the loss of ``closure``, which computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.skip is None:
            super().step()
            return loss
        # torch's kernel has such a flag for GradScaler, which sets it before the step and deletes it afterwards.
        scalers: Tensor | None = getattr(self, "found_inf", None)
        self.found_inf = self.skip if scalers is None else torch.maximum(self.skip, scalers)
        super().step()
        if scalers is None:
            del self.found_inf
        return loss


def adamw(groups: Iterable[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float]) -> AdamW:
    """Return torch's fused AdamW, its fastest form on CPUs and GPUs."""
    return AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]), fused=True)


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
