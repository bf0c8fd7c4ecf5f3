"""The Lightning end of the data: loaders over token files or a task, and where in the stream a run has got to."""

from dataclasses import asdict
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_gpt.data.streams import EvalPass, TrainBatches
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.token_files import TokenFiles

Source = TokenFiles | Task


class TokenData(LightningDataModule):
    """Endless training batches, and an exact pass over the validation split.

    Its only state is how many samples all ranks have consumed, so that a run can be resumed at any optimizer step, on
    any number of ranks and with any micro-batch size, and sees the samples an uninterrupted run would have.

    Args:
        files: The tokens, or a task.
        name: What ``--data`` called them.
        block_size: Tokens per sample.
        batch_size: Samples per rank and micro-batch.
        seed: Seed of the order.
        num_workers: Worker processes that read batches.
        eval_batches: Length of the validation in batches of a single rank; 0 for the whole split.
        stride: Tokens from one window of the validation to the next; None for windows side by side. Not for a task.
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
        self.windows = {"block_size": block_size} | ({} if stride is None else {"stride": stride})
        self.stream = files.train_stream(block_size=block_size, seed=seed)
        self._first_sample = 0
        self._first_step = 0

    @property
    def has_answers(self) -> bool:
        """Whether a sample is a question whose answer is right or wrong."""
        return isinstance(self.files, Task)

    @property
    def _samples_per_step(self) -> int:
        return self.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def train_dataloader(self) -> DataLoader:
        """This rank's micro-batches from where the run has got to, each (idx, targets) of shape (B, T), int64."""
        self._first_step = self.trainer.global_step
        batches = TrainBatches(
            self.stream,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            first_sample=self._first_sample,
        )
        return self._loader(batches)

    def val_dataloader(self) -> DataLoader:
        """This rank's share of the validation, every rank with the same number of batches."""
        batches = self.files.val_pass(
            **self.windows,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            limit_sequences=self.eval_batches * self.batch_size or None,
        )
        return self._loader(batches)

    def _loader(self, batches: TrainBatches | EvalPass) -> DataLoader:
        # A pinned copy pays only where it feeds a GPU.
        pin = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, pin_memory=pin)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the same on every rank: the position in the stream, and the text."""
        steps = self.trainer.global_step - self._first_step
        return {
            "consumed_samples": self._first_sample + steps * self._samples_per_step,
            "data": self.name,
            "task": asdict(self.files) if isinstance(self.files, Task) else None,
            "tokenizer": self.files.tokenizer.to_dict() if self.files.tokenizer else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the samples a checkpoint has consumed."""
        self._first_sample = state_dict["consumed_samples"]
