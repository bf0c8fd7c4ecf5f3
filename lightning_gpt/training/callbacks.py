"""What a run shows and logs: progress bar, speed, memory, MFU, validation lines, and a sample at the end."""

import logging
import resource
import sys
import time
import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_gpt.models import GPTModule
from lightning_gpt.sampling import complete
from lightning_gpt.strategies import peak_flops
from lightning_gpt.tokenizers import Tokenizer


def quiet_lightning() -> None:
    """Silences what the header says better, and advice that does not fit a run over memory-mapped tokens."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*`isinstance.*",
        ".*exists and is not empty.*",
        ".*DeepSpeed handles gradient clipping internally.*",
        ".*each worker will save a shard of the checkpoint.*",
        r".*`torch\.distributed\..*` is deprecated.*",  # calls inside of DeepSpeed
    ):
        warnings.filterwarnings("ignore", message=message)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which knows the length of an endless epoch: the budget in micro-batches."""

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches until the budget is used up."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def init_validation_tqdm(self) -> Tqdm:
        """No second bar: a validation's result gets a line of its own."""
        return Tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The losses; not the log's version number, which says nothing here."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the bar where the run goes on."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.initial = trainer.global_step * trainer.accumulate_grad_batches
        self.train_progress_bar.set_description("train")


class DropoutSeed(Callback):
    """Makes dropout a pure function of (seed, optimizer step, micro-batch, rank), so that a resumed run repeats it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds the generator of the device that computes."""
        micro_batch = (
            trainer.global_step * trainer.accumulate_grad_batches + batch_idx % trainer.accumulate_grad_batches
        )
        # Odd multipliers keep the three numbers apart in the 64 bits of the seed.
        seed = (self.seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + trainer.global_rank) % 2**63
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)


class ValidateAtEnd(Callback):
    """Validates, and so saves, at the last step of the budget, also where that is between two validations."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Asks the loop to stop, which makes it validate first; stopping at ``max_steps`` does not."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class RunMetrics(Callback):
    """Logs speed, learning rate, gradient norm, memory and MFU, and prints a line per validation.

    Between two lines of the log it does nothing but count, so that no step waits for it.

    Args:
        tokens_per_step: Tokens of an optimizer step over all ranks.
        flops_per_token: The model's, for forward and backward pass.
    """

    def __init__(self, *, tokens_per_step: int, flops_per_token: float) -> None:
        self.tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_token * tokens_per_step
        self._peak: float | None = None
        self._since = (0, 0.0)  # step, time
        self._first_step = 0
        self._training_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up what does not change."""
        peak = peak_flops(pl_module.device, precision=str(trainer.precision))
        self._peak = peak * trainer.world_size if peak else None
        self._since = (trainer.global_step, time.perf_counter())
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every ``log_every_n_steps`` optimizer steps: a row of metrics."""
        step = trainer.global_step
        if step % trainer.log_every_n_steps or step == self._since[0]:
            return
        assert isinstance(pl_module, GPTModule)
        now = time.perf_counter()
        self._training_seconds += now - self._since[1]
        seconds = (now - self._since[1]) / (step - self._since[0])
        self._since = (step, now)
        metrics = {
            "step": float(step),
            "tokens_per_second": self.tokens_per_step / seconds,
            "step_time_ms": seconds * 1e3,
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "peak_memory_mib": _peak_memory(pl_module.device) / 2**20,
        }
        if self._peak:
            metrics["mfu"] = self._flops_per_step / seconds / self._peak
        norm = pl_module.gradient_norm()
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        pl_module.log_dict(metrics)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: a validation's time is not training time."""
        if trainer.sanity_checking:
            return
        self._training_seconds += time.perf_counter() - self._since[1]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the speed of the whole run."""
        steps = trainer.global_step - self._first_step
        if not trainer.is_global_zero or not steps or not self._training_seconds:
            return
        seconds = self._training_seconds / steps
        mfu = f"{self._flops_per_step / seconds / self._peak:.1%}" if self._peak else "n/a"
        print(
            f"speed     {self.tokens_per_step / seconds:,.0f} tokens/s, {seconds * 1e3:.1f} ms/step, MFU {mfu},"
            f" peak memory {_peak_memory(pl_module.device) / 2**20:,.0f} MiB"
        )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the validation loss at its step in the log."""
        if not trainer.sanity_checking:
            pl_module.log("step", float(trainer.global_step), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what a validation found, also of weights a run starts from, and starts the clock again."""
        bar = trainer.progress_bar_callback
        if trainer.is_global_zero:
            known = trainer.callback_metrics
            names = [name for name in ("train_loss", "val_loss", "val_accuracy") if name in known]
            shown = ", ".join(f"{name} {float(known[name]):.4f}" for name in names)
            say = print if bar is None or trainer.sanity_checking else bar.print  # the bar is not there yet
            say(f"step {trainer.global_step}: {shown}")
        self._since = (trainer.global_step, time.perf_counter())


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: what the GPU's allocator held, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class FinalSample(Callback):
    """Prints what the trained model writes."""

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: str, max_new_tokens: int, seed: int, top_k: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.top_k = top_k

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples while the model is still on its devices; on all ranks, since each may hold a share of the weights."""
        assert isinstance(pl_module, GPTModule)
        with trainer.precision_plugin.forward_context():
            text = complete(
                pl_module,
                tokenizer=self.tokenizer,
                prompt=self.prompt,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                top_k=self.top_k,
            )
        if trainer.is_global_zero:
            print(f"--- sample ---\n{text}\n--------------")
