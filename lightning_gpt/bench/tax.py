"""``bench.py tax``: time per step of train.py, relative to a hand-written loop."""

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.report import machine_facts, require_positive, spread, write_result
from lightning_gpt.bench.timing import train_silently
from lightning_gpt.cli import parse_train
from lightning_gpt.config import TrainConfig
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.devices import device_time

WARMUP_STEPS = 10  # a multiple of the log interval, so that the timed steps include their share of logging
VOCAB_SIZE = 65
TRAIN_TOKENS, VAL_TOKENS = 1_000_000, 10_000
# nanoGPT's character model for a GPU, and its smaller one for a CPU, without dropout.
GPU = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "precision": "bf16"}
CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "precision": 32}
LOOP, TRAINER = "loop", "trainer"


@dataclass
class Timing:
    """Measurements of one path, one per round.

    Attributes:
        ms_per_step: Mean milliseconds per optimizer step.
        first_loss: Training loss of the first step, nats per token.
        last_loss: Training loss of the last step, nats per token.
    """

    ms_per_step: list[float] = field(default_factory=list)
    first_loss: list[float] = field(default_factory=list)
    last_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Tax:
    """Result of the benchmark.

    Attributes:
        rounds: Number of measurements of each path.
        steps: Timed optimizer steps per round.
        paths: Timings of the paths "loop" and "trainer".
        settings: Settings of both paths: sizes, precision, and whether the model is compiled.
        machine: Hardware and versions.
    """

    rounds: int
    steps: int
    paths: dict[str, Timing]
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """Trainer time divided by loop time, per round, so that drift between rounds cancels."""
        pairs = zip(self.paths[TRAINER].ms_per_step, self.paths[LOOP].ms_per_step, strict=True)
        return [trainer / loop for trainer, loop in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Return settings, measurements and their spreads, ready for JSON."""
        return {
            "benchmark": "tax",
            "rounds": self.rounds,
            "steps": self.steps,
            "warmup_steps": WARMUP_STEPS,
            "settings": {"implementation": "nanogpt", "vocab_size": VOCAB_SIZE} | self.settings,
            "paths": {name: spread(timing.ms_per_step) | asdict(timing) for name, timing in self.paths.items()},
            "ratio": spread(self.ratios) | {"rounds": self.ratios},
            "machine": self.machine,
        }

    def table(self) -> str:
        """Return the result as text."""
        rows = [f"{'path':10}{'median ms/step':>16}{'min':>10}{'max':>10}"]
        measured = {name: timing.ms_per_step for name, timing in self.paths.items()} | {"ratio": self.ratios}
        for name, values in measured.items():
            rows.append(f"{name:10}{statistics.median(values):16.3f}{min(values):10.3f}{max(values):10.3f}")
        m = self.machine
        rows.append(
            f"{self.rounds} alternating rounds, {self.steps} timed steps each; {m['hardware']}, {m['cores']} cores,"
            f" {m['threads']} threads\ntorch {m['torch']}, lightning {m['lightning']}, python {m['python']}"
        )
        return "\n".join(rows)


def measure_tax(
    *, rounds: int, steps: int, threads: int | None = None, compile: bool = False, json: str | None = None
) -> Tax:
    """Time the training step of train.py and of a loop like nanoGPT's train.py.

    Both train the same model from the same weights on the same synthetic tokens, on a GPU if there is one. They take
    turns, and each goes first in every other round. The timed steps of train.py include the logger, the progress bar
    and the callbacks of a default run, but no validation and no checkpoint.

    Args:
        rounds: Number of measurements of each path.
        steps: Timed optimizer steps per round, after the warm-up.
        threads: Number of torch threads for both; None for torch's own choice.
        compile: Whether to compile the model: train.py by block, the loop as a whole, as nanoGPT does.
        json: File for the result, or None.

    Raises:
        UserError: A count is below 1, or the file cannot be written.
    """
    require_positive(rounds=rounds, steps=steps, threads=threads)
    require_writable(json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_threads = torch.get_num_threads()
    threads = threads or default_threads
    settings = (GPU if device.type == "cuda" else CPU) | {"compile": compile}
    tax = Tax(rounds, steps, {LOOP: Timing(), TRAINER: Timing()}, settings, machine_facts(device, threads))
    paths: list[tuple[str, Run]] = [(LOOP, _run_loop), (TRAINER, _run_trainer)]
    try:
        with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as temporary:
            data = Path(temporary, "tokens")
            _write_tokens(data)
            for number in range(rounds):
                config = _config(settings, data, Path(temporary, f"run-{number}"), device, WARMUP_STEPS + steps)
                for name, run in paths if number % 2 == 0 else reversed(paths):
                    torch.set_num_threads(threads)  # train.py may have changed it
                    gc.collect()
                    _record(tax.paths[name], run, config, device, steps)
    finally:
        torch.set_num_threads(default_threads)
    write_result(json, tax.to_dict())
    return tax


def _write_tokens(folder: Path) -> None:
    # Small ids are more frequent, so that there is something to learn.
    draw = np.random.default_rng(0)
    tokens = VOCAB_SIZE * draw.random(TRAIN_TOKENS + VAL_TOKENS) ** 2
    train_tokens, val_tokens = np.split(tokens.astype(np.uint16), [TRAIN_TOKENS])
    write_token_files(
        folder, train=train_tokens, val=val_tokens, tokenizer=None, vocab_size=VOCAB_SIZE, source="synthetic"
    )


def _config(settings: dict[str, Any], data: Path, run_dir: Path, device: torch.device, max_steps: int) -> TrainConfig:
    return parse_train(
        [
            "--implementation=nanogpt",
            "--dropout=0",
            "--bias=false",
            *(f"--{name}={str(value).lower()}" for name, value in settings.items()),
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
    """A clock from the end of the last warm-up step to the end of the last step."""

    device: torch.device
    last_step: int
    started: float = math.nan
    seconds: float = math.nan
    first_loss: Tensor | None = None
    last_loss: Tensor | None = None

    def step_ended(self, step: int, loss: Tensor | None) -> None:
        """Take the time if `step`, from 1, is the last of warm-up or run; keep losses without waiting for them."""
        if step == 1:
            self.first_loss = loss
        if step == WARMUP_STEPS:
            self.started = device_time(self.device)
        elif step == self.last_step:
            self.seconds = device_time(self.device) - self.started
            self.last_loss = loss


Run = Callable[[TrainConfig, _Clock], None]


def _record(timing: Timing, run: Run, config: TrainConfig, device: torch.device, steps: int) -> None:
    clock = _Clock(device, WARMUP_STEPS + steps)
    run(config, clock)
    assert clock.first_loss is not None and clock.last_loss is not None
    timing.ms_per_step.append(clock.seconds / steps * 1e3)
    timing.first_loss.append(clock.first_loss.item())
    timing.last_loss.append(clock.last_loss.item())


class _ClockCallback(Callback):
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Runs last in a step, except for the module's own hook and the writing of log entries.
        assert isinstance(pl_module, GPTModule)
        self.clock.step_ended(trainer.global_step, pl_module.step_loss)


def _run_trainer(config: TrainConfig, clock: _Clock) -> None:
    train_silently(config, _ClockCallback(clock))


def _run_loop(config: TrainConfig, clock: _Clock) -> None:
    """Train with a plain loop, modelled on nanoGPT's train.py (https://github.com/karpathy/nanoGPT)."""
    optim, device, max_steps = config.optim, clock.device, clock.last_step
    torch.manual_seed(config.run.seed)
    row = get_implementation(config.model.implementation)
    fields = config.model_fields | {"vocab_size": VOCAB_SIZE, "block_size": config.model.block_size}
    model: Any = row.build(fields).to(device)
    half = config.trainer.precision == "bf16"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        fused=device.type == "cuda" or None,
    )
    if config.trainer.compile:
        model = torch.compile(model)
    batches = _batches(Path(config.data.data, "train.bin"), config, device)
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
        with autocast:
            _, loss = model(idx, targets)
        idx, targets = next(batches)  # prefetch while a GPU computes
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.trainer.log_every_n_steps == 0:
            loss.item()
        clock.step_ended(step + 1, loss.detach())


def _batches(file: Path, config: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    block_size, batch_size = config.model.block_size, config.data.batch_size
    while True:
        # Open a memory map for each batch, because its pages count as resident memory while it is open.
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[s : s + block_size].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(tokens[s + 1 : s + 1 + block_size].astype(np.int64)) for s in starts])
        if device.type == "cuda":
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        yield x, y
