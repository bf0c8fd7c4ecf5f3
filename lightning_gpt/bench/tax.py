"""What the convenience costs: the time per step of ``train.py`` beside that of a loop written by hand."""

import contextlib
import gc
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from json import dumps
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_gpt.cli import parse_train
from lightning_gpt.config import TrainConfig, UserError
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.models import GPTModule
from lightning_gpt.training.run import train

WARMUP_STEPS = 10  # a multiple of the log interval, so that the timed steps hold as many log lines as they should
VOCAB_SIZE = 65
TRAIN_TOKENS, VAL_TOKENS = 1_000_000, 10_000
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}
BLOCK_SIZE, BATCH_SIZE = 64, 12
LOOP, OURS = "loop", "trainer"


@dataclass
class Timing:
    """The rounds of one path.

    Attributes:
        ms_per_step: Mean time per optimizer step of each round, milliseconds.
        first_loss: Training loss of each round's first step, nats per token.
        last_loss: Training loss of each round's last step.
    """

    ms_per_step: list[float] = field(default_factory=list)
    first_loss: list[float] = field(default_factory=list)
    last_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Tax:
    """Two paths, measured in turns on the same machine.

    Attributes:
        rounds: How often each path was measured.
        steps: Optimizer steps timed in each round.
        paths: The timings by path, "loop" and "trainer".
        machine: Hardware and versions.
    """

    rounds: int
    steps: int
    paths: dict[str, Timing]
    machine: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """The Trainer's time over the loop's in each round: what both share, such as a busy machine, cancels out."""
        pairs = zip(self.paths[OURS].ms_per_step, self.paths[LOOP].ms_per_step, strict=True)
        return [ours / loop for ours, loop in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, and its medians, in plain types."""
        paths = {name: spread(timing.ms_per_step) | asdict(timing) for name, timing in self.paths.items()}
        model = MODEL | {"implementation": "nanogpt", "block_size": BLOCK_SIZE, "vocab_size": VOCAB_SIZE}
        return {
            "benchmark": "tax",
            "rounds": self.rounds,
            "steps": self.steps,
            "warmup_steps": WARMUP_STEPS,
            "model": model,
            "batch_size": BATCH_SIZE,
            "paths": paths,
            "ratio": spread(self.ratios) | {"rounds": self.ratios},
            "machine": self.machine,
        }

    def table(self) -> str:
        """The same for people."""
        rows = [f"{'path':10}{'median ms/step':>16}{'min':>10}{'max':>10}"]
        measured = {name: timing.ms_per_step for name, timing in self.paths.items()} | {"ratio": self.ratios}
        for name, values in measured.items():
            rows.append(f"{name:10}{statistics.median(values):16.3f}{min(values):10.3f}{max(values):10.3f}")
        m = self.machine
        rows.append(
            f"{self.rounds} rounds in turns, {self.steps} timed steps each; {m['hardware']}, {m['cores']} cores,"
            f" {m['threads']} threads\ntorch {m['torch']}, lightning {m['lightning']}, python {m['python']}"
        )
        return "\n".join(rows)


def measure_tax(*, rounds: int = 7, steps: int = 100, threads: int | None = None, json: str | None = None) -> Tax:
    """Times the training step of ``train.py`` and of a loop in the manner of nanoGPT's ``train.py``.

    Both train the same model from the same weights on the same synthetic tokens, in turns; who goes first alternates.
    A round's time runs from the end of the last warm-up step to the end of the last step. In the Trainer's path that
    holds the logger, the progress bar and every callback of a default run, but neither validation nor saving.

    Args:
        rounds: How often each path is measured.
        steps: Optimizer steps timed in each round.
        threads: Threads that torch computes with, the same for both; None for torch's own choice.
        json: Where the result is written as JSON as well.

    Raises:
        UserError: A count is not positive, or the file cannot be written.
    """
    require_positive(rounds=rounds, steps=steps, threads=threads)
    require_writable(json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    tax = Tax(rounds, steps, {LOOP: Timing(), OURS: Timing()}, machine_facts(device, threads or before))
    pair = [(LOOP, _hand_written), (OURS, _through_trainer)]
    try:
        with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as temporary:
            data = Path(temporary, "tokens")
            _write_tokens(data)
            for number in range(rounds):
                config = _config(data, Path(temporary, f"run-{number}"), device, WARMUP_STEPS + steps)
                for name, run in pair if number % 2 == 0 else reversed(pair):
                    torch.set_num_threads(threads or before)
                    gc.collect()
                    _record(tax.paths[name], run, config, device, steps)
    finally:
        torch.set_num_threads(before)
    write_result(json, tax.to_dict())
    return tax


def require_positive(**counts: int | None) -> None:
    """Checks options that count what is measured; one that is not given may be None.

    Raises:
        UserError: One of them is below 1.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} leaves nothing to measure; give a positive number")


def require_writable(file: str | None, *, flag: str = "json") -> None:
    """Checks the file for a result before anything is measured.

    Raises:
        UserError: It cannot be written.
    """
    if file and (Path(file).is_dir() or not os.access(Path(file).resolve().parent, os.W_OK)):
        raise UserError(f"--{flag} {file} cannot be written: name a file in a folder that can")


def write_result(json: str | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON where that was asked for."""
    if json:
        Path(json).write_text(dumps(result, indent=2) + "\n", encoding="utf-8")


def spread(values: list[float]) -> dict[str, float]:
    """What is told of the rounds of a measurement."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine_facts(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware and versions, for the record beside a number."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "hardware": f"{torch.cuda.get_device_name(device)} and {cpu}" if device.type == "cuda" else cpu,
        "device": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def _write_tokens(folder: Path) -> None:
    """Tokens that can be learnt a little: their frequencies differ."""
    draw = np.random.default_rng(0)
    tokens = VOCAB_SIZE * draw.random(TRAIN_TOKENS + VAL_TOKENS) ** 2
    train_tokens, val_tokens = np.split(tokens.astype(np.uint16), [TRAIN_TOKENS])
    write_token_files(
        folder, train=train_tokens, val=val_tokens, tokenizer=None, vocab_size=VOCAB_SIZE, source="synthetic"
    )


def _config(data: Path, run_dir: Path, device: torch.device, max_steps: int) -> TrainConfig:
    """The run as ``train.py`` would be asked for it; all that is not said here is its default."""
    return parse_train(
        [
            "--implementation=nanogpt",
            *(f"--{name}={str(value).lower()}" for name, value in MODEL.items()),
            f"--block_size={BLOCK_SIZE}",
            f"--batch_size={BATCH_SIZE}",
            f"--data={data}",
            f"--out_dir={run_dir}",
            f"--accelerator={device.type}",
            "--devices=1",
            f"--max_steps={max_steps}",
            f"--eval_interval={max_steps + 1}",
            "--eval_batches=1",
        ]
    )


@dataclass
class _Clock:
    """Takes the time at the end of the last warm-up step and of the last step."""

    device: torch.device
    last_step: int
    started: float = math.nan
    seconds: float = math.nan
    first_loss: Tensor | None = None
    last_loss: Tensor | None = None

    def step_ended(self, step: int, loss: Tensor | None) -> None:
        """Is told of every step, counted from 1, and its loss, which is not read before the end."""
        if step == 1:
            self.first_loss = loss
        if step == WARMUP_STEPS:
            self._wait()
            self.started = time.perf_counter()
        elif step == self.last_step:
            self._wait()
            self.seconds = time.perf_counter() - self.started
            self.last_loss = loss

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Run = Callable[[TrainConfig, _Clock], None]


def _record(timing: Timing, run: Run, config: TrainConfig, device: torch.device, steps: int) -> None:
    clock = _Clock(device, WARMUP_STEPS + steps)
    run(config, clock)
    assert clock.first_loss is not None and clock.last_loss is not None
    timing.ms_per_step.append(clock.seconds / steps * 1e3)
    timing.first_loss.append(clock.first_loss.item())
    timing.last_loss.append(clock.last_loss.item())


class _ClockCallback(Callback):
    """Tells the clock of the Trainer's steps."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Comes after all that a step does except the module's own hook and the writing of a due log line."""
        assert isinstance(pl_module, GPTModule)
        self.clock.step_ended(trainer.global_step, pl_module.step_loss)


def train_unseen(config: TrainConfig, callback: Callback) -> None:
    """The whole of ``train.py``, but what it writes to the terminal goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(config, callbacks=[callback])


def _through_trainer(config: TrainConfig, clock: _Clock) -> None:
    train_unseen(config, _ClockCallback(clock))


def _hand_written(config: TrainConfig, clock: _Clock) -> None:
    """A loop after nanoGPT's ``train.py`` (https://github.com/karpathy/nanoGPT), which is what people write by hand."""
    optim, device, max_steps = config.optim, clock.device, clock.last_step
    torch.manual_seed(config.run.seed)
    row = get_implementation(config.model.implementation)
    fields = config.model_fields | {"vocab_size": VOCAB_SIZE, "block_size": config.model.block_size}
    model = row.build(fields).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        **({"fused": True} if device.type == "cuda" else {}),
    )
    batches = _hand_written_batches(Path(config.data.data, "train.bin"), config, device)
    warmup, floor = min(100, max_steps // 10), optim.learning_rate / 10
    idx, targets = next(batches)
    for step in range(max_steps):
        if step < warmup:
            rate = optim.learning_rate * (step + 1) / (warmup + 1)
        else:
            progress = (step - warmup) / (max_steps - warmup)
            rate = floor + 0.5 * (1 + math.cos(math.pi * progress)) * (optim.learning_rate - floor)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(idx, targets)
        idx, targets = next(batches)  # read and sent while a GPU computes
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.trainer.log_every_n_steps == 0:
            loss.item()
        clock.step_ended(step + 1, loss.detach())


def _hand_written_batches(file: Path, config: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    block_size, batch_size = config.model.block_size, config.data.batch_size
    while True:
        tokens = np.memmap(file, dtype=np.uint16, mode="r")  # anew for each batch, else its pages count as memory
        starts = torch.randint(len(tokens) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[s : s + block_size].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(tokens[s + 1 : s + 1 + block_size].astype(np.int64)) for s in starts])
        if device.type == "cuda":
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        yield x, y
