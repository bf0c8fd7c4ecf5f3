"""The LightningDataModule: loaders over token files or a task, and a run's position in its training stream."""

import signal
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gpt.data.streams import EvalBatches, EvalPass, Stream, TokenStream, TrainBatches
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.token_files import TokenFiles

Source = TokenFiles | Task


def _ignore_signals(_: int) -> None:
    """Leave it to the training process when its workers end: Ctrl-C and SLURM send signals to all processes."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class TokenData(LightningDataModule):
    """Load endless training batches, and one exact pass over the validation split.

    The only state is how many samples all ranks have consumed. A run can therefore resume at any optimizer step, on any
    number of ranks and with any micro-batch size, and sees the same samples as an uninterrupted run.

    Args:
        files: Token files or a task.
        name: The value of ``--data``.
        block_size: Tokens per sample, T.
        batch_size: Samples per rank and micro-batch, B.
        seed: Seed of the sample order.
        num_workers: Worker processes that read batches.
        eval_batches: Number of batches to validate on, over all ranks; 0 for the whole split.
        stride: Tokens between the starts of validation windows; None for block_size. Must be None for a task.
    """

    def __init__(
        self,
        files: Source,
        *,
        name: str,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        eval_batches: int = 0,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        self.files = files
        self.name = name
        self.block_size = block_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.eval_batches = eval_batches
        self.stride = stride
        self.stream: Stream
        if isinstance(files, Task):
            assert stride is None
            self.stream = files.train_stream(block_size=block_size, seed=seed)
        else:
            opener = files.opener("train")
            self.stream = TokenStream(opener, n_tokens=files.train_tokens, block_size=block_size, seed=seed)
        self._first_sample = 0
        self._first_step = 0

    @property
    def has_answers(self) -> bool:
        """Return whether samples are questions whose answers are right or wrong."""
        return isinstance(self.files, Task)

    @property
    def _attached_trainer(self) -> Trainer:
        assert self.trainer is not None, "a Trainer sets itself before it asks for loaders or state"
        return self.trainer

    @property
    def _samples_per_step(self) -> int:
        return self.batch_size * self._attached_trainer.accumulate_grad_batches * self._attached_trainer.world_size

    def train_dataloader(self) -> DataLoader:
        """Return this rank's micro-batches from the current position on, each (idx, targets) of (B, T) int64."""
        self._first_step = self._attached_trainer.global_step
        batches = TrainBatches(
            self.stream,
            batch_size=self.batch_size,
            rank=self._attached_trainer.global_rank,
            world_size=self._attached_trainer.world_size,
            first_sample=self._first_sample,
        )
        return self._loader(batches)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of the validation split; all ranks have the same number of batches."""
        share: dict[str, Any] = {
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "rank": self._attached_trainer.global_rank,
            "world_size": self._attached_trainer.world_size,
            "limit_sequences": self.eval_batches * self.batch_size or None,
        }
        if isinstance(self.files, Task):
            return self._loader(self.files.val_pass(**share))
        opener, n_tokens = self.files.opener("val"), self.files.val_tokens
        return self._loader(EvalBatches(opener, n_tokens=n_tokens, stride=self.stride, **share))

    def _loader(self, batches: TrainBatches | EvalPass) -> DataLoader:
        # Pinning costs a copy, which only a GPU repays.
        pin = self._attached_trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            batches, batch_size=None, num_workers=self.num_workers, pin_memory=pin, worker_init_fn=_ignore_signals
        )

    def transfer_batch_to_device(
        self, batch: tuple[Tensor, Tensor], device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Copy idx and targets to the device; from pinned memory, without waiting."""
        idx, targets = batch
        return idx.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream and the data's description, the same on every rank."""
        steps = self._attached_trainer.global_step - self._first_step
        return {
            "consumed_samples": self._first_sample + steps * self._samples_per_step,
            "data": self.name,
            "task": self.files.to_dict() if isinstance(self.files, Task) else None,
            "tokenizer": self.files.tokenizer.to_dict() if self.files.tokenizer else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples that the checkpointed run has consumed."""
        self._first_sample = state_dict["consumed_samples"]
