"""A callback for scripts that train with a plain ``lightning.Trainer``; training/callbacks.py has those of train.py."""

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.strategies.devices import device_time
from lightning_gpt.training.callbacks import peak_memory


class CUDAMetricsCallback(Callback):
    """Print each epoch's duration and peak memory, averaged over ranks.

    The memory is that of the GPU's allocator, or on a CPU the resident memory of the process since its start.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and forget the peak so far."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = device_time(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print two lines on rank 0."""
        seconds = device_time(pl_module.device) - self._start
        mine = torch.tensor([seconds, peak_memory(pl_module.device) / 2**20], device=pl_module.device)
        means = trainer.strategy.reduce(mine, reduce_op="mean")
        assert isinstance(means, torch.Tensor)
        if trainer.is_global_zero:
            print(f"Average Epoch time: {means[0]:.2f} seconds")
            print(f"Average Peak memory {means[1]:.2f}MiB")
