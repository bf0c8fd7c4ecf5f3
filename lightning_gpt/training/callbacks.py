"""Callbacks of a run: progress bar, speed, memory, MFU, validation lines, dropout seeds and a final sample."""

import importlib.util
import logging
import sys
import time
import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from tqdm import tqdm

from lightning_gpt.models import GPTModule
from lightning_gpt.progress import Progress
from lightning_gpt.sampling import complete
from lightning_gpt.strategies import peak_flops
from lightning_gpt.strategies.devices import device_time
from lightning_gpt.tokenizers import Tokenizer
from lightning_gpt.training.curves import CurveLogger


def quiet_lightning() -> None:
    """Silence Lightning's messages that our header replaces, and its advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*`isinstance.*",
        ".*exists and is not empty.*",
        ".*DeepSpeed handles gradient clipping internally.*",
        ".*each worker will save a shard of the checkpoint.*",
        r".*`torch\.distributed\..*` is deprecated.*",  # calls inside DeepSpeed
    ):
        warnings.filterwarnings("ignore", message=message)


def warn(message: str) -> None:
    """Print one line on stderr, above the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class ProgressBar(LightningProgressBar):
    """Show the steps of the budget, with the loss and speed that were logged last and the time left.

    Args:
        curves: The logger that knows them. Lightning would read metrics from the device after each micro-batch.
    """

    def __init__(self, curves: CurveLogger) -> None:
        super().__init__()
        self.curves = curves
        self.is_enabled = True
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Show nothing, on ranks other than the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show the progress."""
        self.is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the current step, which is not 0 in a resumed run."""
        if self.is_enabled:
            self._progress = Progress(
                "train", total=trainer.max_steps, done=trainer.global_step, unit="steps", keep=True
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance at the end of an optimizer step."""
        if self._progress is not None and trainer.global_step > self._progress.done:
            self._progress.update(trainer.global_step, self._note())

    def _note(self) -> str:
        known = self.curves.latest
        loss = [f"loss {known['train_loss']:.4f}"] if "train_loss" in known else []
        speed = [f"{known['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in known else []
        return ", ".join(loss + speed)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        (print if self._progress is None else self._progress.write)(*args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last step, and close the bar."""
        if self._progress is not None:
            self._progress.update(trainer.global_step, self._note(), last=True)
            self._progress.close()

    def on_exception(self, *_: Any) -> None:
        """Close the bar, so that messages begin on a line of their own."""
        if self._progress is not None:
            self._progress.close()


class DropoutSeed(Callback):
    """Make dropout a function of (seed, optimizer step, micro-batch, rank), so that resumed runs repeat it exactly."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the random generator of the module's device."""
        micro_batch = (
            trainer.global_step * trainer.accumulate_grad_batches + batch_idx % trainer.accumulate_grad_batches
        )
        # Large odd multipliers spread the three numbers over the 64 bits of the seed.
        seed = (self.seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + trainer.global_rank) % 2**63
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)


class ValidateAtEnd(Callback):
    """Validate and save at the last step of the budget, even between two regular validations."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Set ``should_stop`` at the last step: the loop then validates, which it does not do at ``max_steps``."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class Patience(EarlyStopping):
    """Stop when ``patience`` validations in a row have not lowered val_loss; all ranks decide together."""

    def __init__(self, patience: int) -> None:
        super().__init__("val_loss", patience=patience, check_finite=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count, towards the patience of this run's flags."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the run has ended early."""
        if self.wait_count >= self.patience and trainer.is_global_zero:
            print(
                f"stopped at step {trainer.global_step}: val_loss has not fallen for {self.wait_count} validations; the"
                f" best is {float(self.best_score):.4f}"
            )


class RunMetrics(Callback):
    """Log speed, learning rate, gradient norm, memory and MFU, and print a line for each validation.

    The mean speed that is printed at the end does not count the first step, which compiles and warms up, and
    validations. Steps that are not logged do not wait for the device, except the first.

    Args:
        tokens_per_step: Tokens per optimizer step over all ranks.
        flops_per_token: The model's FLOPs per token, forward and backward pass.
    """

    def __init__(self, *, tokens_per_step: int, flops_per_token: float) -> None:
        self.tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_token * tokens_per_step
        self._peak: float | None = None
        self._since = (0, 0.0)  # step and time of the last log entry or validation
        self._first_step = 0
        self._first_seconds = 0.0
        self._steady_steps, self._steady_seconds = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and look up the peak FLOP/s over all devices."""
        peak = peak_flops(pl_module.device, precision=str(trainer.precision))
        self._peak = peak * trainer.world_size if peak else None
        self._since = (trainer.global_step, device_time(pl_module.device))
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics every ``log_every_n_steps`` optimizer steps."""
        step = trainer.global_step
        if step == self._since[0]:
            return
        is_first = step == self._first_step + 1
        if is_first:
            self._first_seconds = device_time(pl_module.device) - self._since[1]
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged:
            self._log(trainer, pl_module, seconds=(time.perf_counter() - self._since[1]) / (step - self._since[0]))
        if is_first or is_logged:
            self._lap(step, time.perf_counter())

    def seconds_per_step(self) -> float | None:
        """Return the mean seconds of the steps so far; None before the first step has ended."""
        return self._steady_seconds / self._steady_steps if self._steady_steps else self._first_seconds or None

    def _lap(self, step: int, now: float) -> None:
        """Count the time since the last lap."""
        if step > self._first_step + 1:
            self._steady_steps += step - self._since[0]
            self._steady_seconds += now - self._since[1]
        self._since = (step, now)

    def _log(self, trainer: Trainer, pl_module: LightningModule, *, seconds: float) -> None:
        """Log the metrics of a step that took so many seconds."""
        assert isinstance(pl_module, GPTModule)
        metrics = {
            "tokens_per_second": self.tokens_per_step / seconds,
            "step_time_ms": seconds * 1e3,
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "peak_memory_mib": peak_memory(pl_module.device) / 2**20,
        }
        if self._peak:
            metrics["mfu"] = self._flops_per_step / seconds / self._peak
        norm = pl_module.gradient_norm()
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        pl_module.step_metrics |= metrics

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, so that validation does not count as training time."""
        if trainer.sanity_checking:
            return
        self._lap(trainer.global_step, device_time(pl_module.device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the mean speed of the run."""
        if not trainer.is_global_zero or trainer.global_step == self._first_step:
            return
        seconds = self.seconds_per_step()
        assert seconds is not None
        parts = [f"{self.tokens_per_step / seconds:,.0f} tokens/s", f"{seconds * 1e3:.1f} ms/step"]
        if self._peak:
            parts.append(f"MFU {self._flops_per_step / seconds / self._peak:.1%}")
        if memory := peak_memory(pl_module.device):
            parts.append(f"peak memory {memory / 2**20:,.0f} MiB")
        print(f"speed     {', '.join(parts)}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the step with the validation loss, which loggers would otherwise plot over batches."""
        if not trainer.sanity_checking:
            pl_module.log("step", float(trainer.global_step), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores, including those of initial weights, and restart the clock."""
        bar = trainer.progress_bar_callback
        if trainer.is_global_zero:
            known = trainer.callback_metrics
            names = [name for name in ("train_loss", "val_loss", "val_accuracy") if name in known]
            shown = ", ".join(f"{name} {float(known[name]):.4f}" for name in names)
            say = print if bar is None or trainer.sanity_checking else bar.print  # the sanity check has no bar yet
            say(f"step {trainer.global_step}: {shown}")
        self._since = (trainer.global_step, time.perf_counter())


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of the GPU's allocator, else the peak resident memory of this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # on Windows
        return 0
    import resource

    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class FinalSample(Callback):
    """Print a sample of the trained model at the end of the run."""

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: str, max_new_tokens: int, seed: int, temperature: float, top_k: int
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.temperature = temperature
        self.top_k = top_k

    def text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return a sample; call it on all ranks, because weights may be sharded."""
        assert isinstance(pl_module, GPTModule)
        with trainer.precision_plugin.forward_context():
            return complete(
                pl_module,
                tokenizer=self.tokenizer,
                prompt=self.prompt,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                temperature=self.temperature,
                top_k=self.top_k,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample while the model is on its devices."""
        text = self.text(trainer, pl_module)
        if trainer.is_global_zero:
            print(f"--- sample ---\n{text}\n--------------")
