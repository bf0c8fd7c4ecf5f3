"""``--log_samples``: what the model writes, and the gradient norm of each block, at intervals."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_gpt.atomic import atomic_file
from lightning_gpt.models import GPTModule
from lightning_gpt.training.callbacks import FinalSample
from lightning_gpt.training.health import loss_scale
from lightning_gpt.training.loggers import TextLogger

SAMPLES = "samples"  # in the run folder
_REST = "rest"  # name of the weights outside of blocks


class LoggedSamples(Callback):
    """Write a sample to the run folder and to the loggers every few steps, with the norms of the step's gradients.

    Under DeepSpeed gradients cannot be seen, so that there are no norms.

    Args:
        sample: How to sample.
        every: Number of steps.
        run_dir: The run folder.
    """

    def __init__(self, sample: FinalSample, *, every: int, run_dir: Path) -> None:
        self._sample = sample
        self._every = every
        self._folder = run_dir / SAMPLES
        self._norms: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients before they are clipped."""
        assert isinstance(pl_module, GPTModule)
        if (trainer.global_step + 1) % self._every:
            return
        # The step of a fused optimizer removes the loss scale only after this.
        scale = loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        self._norms = {name: norm / scale for name, norm in _norms(pl_module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample on all ranks, because weights may be sharded."""
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % self._every:
            return
        text = self._sample.text(trainer, pl_module)
        metrics = {f"grad_norm/{name}": float(norm) for name, norm in self._norms.items()}
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics(metrics, step=step)
            if isinstance(logger, TextLogger):
                logger.log_sample(text, step=step)
        if trainer.is_global_zero:
            self._folder.mkdir(exist_ok=True)
            with atomic_file(self._folder / f"{step}.txt", mode="w") as file:
                file.write(text)


def _norms(module: GPTModule) -> dict[str, Tensor]:
    """Return the gradient norm of each block, and of the other weights, on the device."""
    block_class = module.implementation.block_class()
    blocks = {
        name: list(block.parameters())
        for name, block in module.model.named_modules()
        if block_class is not None and isinstance(block, block_class)
    }
    inside = {parameter for parameters in blocks.values() for parameter in parameters}
    blocks[_REST] = [parameter for parameter in module.model.parameters() if parameter not in inside]
    found = {}
    for name, parameters in blocks.items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            found[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return found
