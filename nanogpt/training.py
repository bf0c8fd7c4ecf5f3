"""Methods of nanoGPT's model that its training script calls: the optimizer, and model FLOPs utilization."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from nanogpt.model import GPT

_A100 = 312e12  # peak FLOP/s in bf16


def configure_optimizers(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
) -> torch.optim.AdamW:
    """Return AdamW with weight decay on all tensors of two or more dimensions.

    Args:
        model: The model, on its device.
        weight_decay: Decoupled weight decay.
        learning_rate: Learning rate.
        betas: Decay rates of the moments.
        device_type: Has no effect: the optimizer is fused on every type of device, not only on "cuda".
    """
    from lightning_gpt.implementations.registry import decay_matrices
    from lightning_gpt.optim.adamw import adamw
    from lightning_gpt.optim.groups import parameter_groups

    groups = parameter_groups(model, decays=decay_matrices, weight_decay=weight_decay)
    return adamw(groups, learning_rate=learning_rate, betas=betas)


def estimate_mfu(model: "GPT", fwdbwd_per_iter: int, dt: float) -> float:
    """Return the model's FLOP/s as a fraction of an A100's peak in bf16, whatever the device, as nanoGPT does.

    Args:
        model: The model.
        fwdbwd_per_iter: Sequences of ``block_size`` tokens per iteration.
        dt: Seconds per iteration.
    """
    from lightning_gpt.planning import flops_per_token

    T = model.config.block_size
    return flops_per_token(model, block_size=T) * T * fwdbwd_per_iter / dt / _A100
