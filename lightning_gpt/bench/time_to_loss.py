"""``bench.py time_to_loss``: steps and seconds of train.py until nanoGPT's validation loss is reached."""

import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.curves import Curve, TimeToLoss, Trained, read_result
from lightning_gpt.bench.report import machine_facts, require_positive, write_result
from lightning_gpt.bench.timing import train_silently
from lightning_gpt.charts import require_chart, save_chart
from lightning_gpt.cli import parse_train
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.devices import device_time

TRIAL_STEPS = 10
_EVERY_RUN = "--devices=1 --eval_batches=0 --logger=none --sample_tokens=0 --trainer.enable_progress_bar=false"


@dataclass(frozen=True)
class Row:
    """A training setup to compare.

    Attributes:
        flags: Flags of train.py, added to the recipe's.
        steps: Optimizer steps of the run and its schedule.
        eval_interval: Optimizer steps between validations, the resolution of the result.
    """

    flags: str
    steps: int
    eval_interval: int

    def shortened(self, steps: int, *, longest: int) -> "Row":
        """Return this row with its steps and interval scaled by ``steps / longest``."""
        return Row(self.flags, *(max(1, number * steps // longest) for number in (self.steps, self.eval_interval)))


@dataclass(frozen=True)
class Recipe:
    """Rows to compare, and the settings that they share.

    Attributes:
        flags: Flags of train.py.
        device: "cpu" or "cuda".
        rows: Rows by name; the first one selected is the baseline.
        goal: Target loss in nats per token; None for the baseline's final loss.
    """

    flags: str
    device: str
    rows: dict[str, Row]
    goal: float | None = None


_NANOGPT = "--implementation=nanogpt --dropout=0 --bias=false"
_MODERNGPT = "--implementation=moderngpt --bigram=1021 --smear=true --beta2=0.95"

# Learning rates, weight decay and warm-up are tuned for each row, except for nanogpt-published.
RECIPES = {
    "cpu": Recipe(
        "--accelerator=cpu --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --beta2=0.99"
        " --warmup_steps=100 --weight_decay=0.1 --gradient_clip_val=1",
        "cpu",
        {
            "nanogpt-published": Row(f"{_NANOGPT} --learning_rate=1e-3 --min_learning_rate=1e-4", 2000, 500),
            "nanogpt-adamw": Row(f"{_NANOGPT} --learning_rate=6e-3 --min_learning_rate=6e-4", 2000, 250),
            "nanogpt-muon": Row(
                f"{_NANOGPT} --optimizer=muon --muon_learning_rate=0.012 --learning_rate=3e-3 --min_learning_rate=0"
                " --weight_decay=0.03",
                2000,
                200,
            ),
            "moderngpt-adamw": Row(
                f"{_MODERNGPT} --learning_rate=6e-3 --min_learning_rate=0 --weight_decay=0.03", 2000, 100
            ),
            "moderngpt-muon": Row(
                f"{_MODERNGPT} --optimizer=muon --muon_learning_rate=0.012 --learning_rate=4e-3 --min_learning_rate=0"
                " --weight_decay=0.03",
                2000,
                200,
            ),
            "moderngpt-muon-short": Row(
                f"{_MODERNGPT} --optimizer=muon --muon_learning_rate=0.05 --learning_rate=1.5e-2 --warmup_steps=5",
                250,
                25,
            ),
        },
    ),
    # bfloat16 and torch.compile, as in nanoGPT on a GPU.
    "gpu": Recipe(
        "--accelerator=gpu --precision=bf16 --compile=true --n_layer=6 --n_head=6 --n_embd=384 --block_size=256"
        " --batch_size=64 --beta2=0.99 --warmup_steps=100 --weight_decay=0.1 --gradient_clip_val=1",
        "cuda",
        {
            "nanogpt-published": Row(
                "--implementation=nanogpt --dropout=0.2 --bias=false --learning_rate=1e-3 --min_learning_rate=1e-4",
                5000,
                250,
            ),
            "moderngpt-muon": Row(
                f"{_MODERNGPT} --dropout=0.2 --optimizer=muon --learning_rate=1e-3 --min_learning_rate=0", 5000, 100
            ),
        },
        goal=1.47,
    ),
}


class _Recorder(Callback):
    """Record each validation in a curve.

    The clock runs from the start of the first training step after a validation to the next validation. It includes
    the first step of the run, but not the loading of the batch before the clock starts.
    """

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.val_tokens = 0
        self._seconds = 0.0
        self._started: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock if it is stopped."""
        if self._started is None:
            self._started = device_time(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock once the device has finished all steps."""
        assert self._started is not None
        self._seconds += device_time(pl_module.device) - self._started
        self._started = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation."""
        assert isinstance(pl_module, GPTModule)
        self.val_tokens = pl_module.val_tokens
        self.curve.steps.append(trainer.global_step)
        self.curve.seconds.append(self._seconds)
        self.curve.losses.append(float(trainer.callback_metrics["val_loss"]))


def measure_time_to_loss(
    *,
    data: str,
    recipe: str,
    rows: str | None,
    seeds: int,
    steps: int | None,
    threads: int | None,
    json: str | None,
    plot: str | None,
    from_file: str | None,
) -> TimeToLoss:
    """Train every row with every seed through train.py, and find when each run reaches the target loss.

    A short trial of every row comes first: it reports errors before anything is measured, and keeps one-time costs of
    the process out of the measurement. Then all rows are trained with the first seed, then with the second, and so on,
    so that drift of the machine's speed affects all rows.

    Args:
        data: Text or token files, as for train.py.
        recipe: Name of the recipe.
        rows: Names of its rows, separated by commas, the baseline first; None for all.
        seeds: Number of runs of each row.
        steps: Optimizer steps of the longest row, to which other rows shrink in proportion; None for the recipe's.
        threads: Number of torch threads; None for torch's own choice.
        json: File for the result, written after each seed, or None.
        plot: PNG file for the curves, or None.
        from_file: Earlier result to show instead of training, or None.

    Raises:
        UserError: An option is wrong, a row cannot be trained here, or a file cannot be read or written.
    """
    require_positive(seeds=seeds, steps=steps, threads=threads)
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: unknown; choose one of {', '.join(RECIPES)}")
    selected = _select(recipe, rows=rows, steps=steps)
    require_writable(json)
    if plot:
        require_chart(plot)
    if from_file:
        result = read_result(from_file)
    else:
        flags = {"data": data, "recipe": recipe, "rows": rows, "seeds": seeds, "steps": steps, "threads": threads}
        command = ["python bench.py time_to_loss", *(f"--{k} {v}" for k, v in flags.items() if v is not None)]
        result = _measure(" ".join(command), recipe, selected, data=data, seeds=seeds, threads=threads, json=json)
    write_result(json, result.to_dict())
    if plot:
        save_chart(result.draw(), Path(plot))
    return result


def _select(recipe: str, *, rows: str | None, steps: int | None) -> dict[str, Row]:
    known = RECIPES[recipe].rows
    names = [name.strip() for name in rows.split(",")] if rows else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--rows {unknown[0]}: unknown; choose from {', '.join(known)}")
    longest = max(row.steps for row in known.values())
    return {name: known[name].shortened(steps or longest, longest=longest) for name in names}


def _measure(
    command: str,
    recipe: str,
    rows: dict[str, Row],
    *,
    data: str,
    seeds: int,
    threads: int | None,
    json: str | None,
) -> TimeToLoss:
    shared, device = RECIPES[recipe], torch.device(RECIPES[recipe].device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--recipe {recipe}: needs a GPU, and none was found; give --recipe cpu")
    flags = {
        name: [
            *f"{_EVERY_RUN} {shared.flags} {row.flags}".split(),
            f"--max_steps={row.steps}",
            f"--eval_interval={row.eval_interval}",
        ]
        for name, row in rows.items()
    }
    for row_flags in flags.values():  # check all rows before training the first
        parse_train(row_flags)
    default_threads = torch.get_num_threads()
    threads = threads or default_threads
    trained = {name: Trained(row_flags) for name, row_flags in flags.items()}
    result = TimeToLoss(command, recipe, shared.goal, 0, machine_facts(device, threads), trained)
    try:
        torch.set_num_threads(threads)
        for name in rows:
            trial = [f"--max_steps={TRIAL_STEPS}", f"--eval_interval={TRIAL_STEPS}", "--eval_batches=1"]
            _run([*flags[name], *trial, f"--data={data}"], _Recorder(Curve(RunOptions.seed)))
        for seed in range(RunOptions.seed, RunOptions.seed + seeds):
            for name in rows:
                curve = Curve(seed)
                recorder = _Recorder(curve)
                _run([*flags[name], f"--data={data}", f"--seed={seed}"], recorder)
                result.val_tokens = recorder.val_tokens
                result.rows[name].curves.append(curve)
                line = f"{name}, seed {seed}: loss {curve.losses[-1]:.4f} after {curve.seconds[-1]:.1f} s of training"
                print(line, file=sys.stderr, flush=True)
            write_result(json, result.to_dict())  # keep the finished seeds if a long measurement is interrupted
    finally:
        torch.set_num_threads(default_threads)
    return result


def _run(flags: list[str], recorder: _Recorder) -> None:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as folder:
        train_silently(parse_train([*flags, f"--out_dir={folder}"]), recorder)
