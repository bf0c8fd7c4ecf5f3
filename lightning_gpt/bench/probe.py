"""Read time and memory of real training steps with growing batches, from inside a rank."""

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.bench.forked import peak_resident_bytes, reset_peak, resident_bytes
from lightning_gpt.strategies.devices import device_time

OUT_OF_MEMORY = 77  # exit code of a rank that has reached its limit
_WARM_UP_STEPS = 2
_POLL_SECONDS = 0.02
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_SMALLEST_MAPPED = 32 * 1024
_LARGEST_UNMAPPED = 32 * 1024**2  # what glibc raises its threshold to


@dataclass(frozen=True)
class Reading:
    """What one rank read at one batch size.

    Attributes:
        rank: The rank.
        batch: Sequences per rank.
        peak: Peak bytes within a step: the GPU's allocator, or on a CPU the resident memory that the run added.
        seconds: Time of each timed step.
    """

    rank: int
    batch: int
    peak: int
    seconds: list[float]


class Probe(Callback):
    """Train some steps at each batch size, append a reading for each to a file, and end the process.

    After two steps to warm up, the memory of one step is read at each batch size; then steps are timed.

    Args:
        batches: Batch sizes per rank, smallest first. Sequences of the loaded batch are repeated.
        steps: Timed optimizer steps at the last batch size; 0 for none.
        limit: Bytes that a rank may use; None for all there are.
        file: The readings, one JSON object per line; all ranks append to it.
        threads: Number of torch threads; None for torch's own choice.
    """

    def __init__(
        self, batches: Sequence[int], *, steps: int, limit: int | None, file: Path, threads: int | None
    ) -> None:
        self.limit = limit
        self.file = file
        self._cuda = False
        self._started = 0.0
        self._peak = 0
        self._seconds: list[float] = []
        # What each step does: its batch size, and whether it warms up, has its memory read, or is timed.
        self._plan = [(batches[0], "warm up")] * _WARM_UP_STEPS + [(batch, "memory") for batch in batches]
        if steps:
            self._plan += [(batches[-1], "warm up")] + [(batches[-1], "time")] * steps
        if threads is not None:
            torch.set_num_threads(threads)
        self._before = 0
        if sys.platform == "linux":
            # malloc then returns freed tensors to the system, so that resident memory is exact; but it is slower.
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _SMALLEST_MAPPED)
            self._before = resident_bytes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the limit, and let training steps see batches of the planned size."""
        self._cuda = trainer.strategy.root_device.type == "cuda"
        if self._cuda and self.limit is not None:
            card = torch.cuda.get_device_properties(trainer.strategy.root_device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / card.total_memory))
        elif not self._cuda:
            threading.Thread(target=self._watch, daemon=True).start()
        step = pl_module.training_step

        def with_planned_batch(batch: Any, batch_idx: int) -> Any:
            n = self._plan[0][0]
            return step(tuple(t[torch.arange(n, device=t.device) % len(t)] for t in batch), batch_idx)

        pl_module.training_step = with_planned_batch  # type: ignore[method-assign]

    def _watch(self) -> None:
        """End the process when it uses too much memory, before the machine does."""
        while self.limit is not None:
            if resident_bytes() - self._before > self.limit:
                os._exit(OUT_OF_MEMORY)
            time.sleep(_POLL_SECONDS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, or the peak."""
        what = self._plan[0][1]
        if what == "memory" and self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif what == "memory":
            gc.collect()
            reset_peak()
        elif what == "time" and not self._cuda:
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST_UNMAPPED)
        self._started = device_time(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the reading, and end the process after the last one."""
        n, what = self._plan.pop(0)
        seconds = device_time(pl_module.device) - self._started
        if what == "time":
            self._seconds.append(seconds)
        if what == "memory":
            self._peak = torch.cuda.max_memory_allocated() if self._cuda else peak_resident_bytes() - self._before
            if self.limit is not None and self._peak > self.limit:
                os._exit(OUT_OF_MEMORY)
        if what != "warm up" and not any(kind == "time" for _, kind in self._plan):
            reading = Reading(trainer.global_rank, n, self._peak, self._seconds)
            with self.file.open("a", encoding="ascii") as file:
                file.write(json.dumps(asdict(reading)) + "\n")
            # All ranks have taken it before any goes on, so that one that ends does not take it from the others.
            trainer.strategy.barrier()
        if not self._plan:
            os._exit(0)  # without the validation and the checkpoint of a run's end


def read(file: Path) -> list[Reading]:
    """Return the readings in a file; none if it does not exist."""
    if not file.exists():
        return []
    return [Reading(**json.loads(line)) for line in file.read_text(encoding="ascii").splitlines()]
