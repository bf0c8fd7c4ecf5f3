"""How soon a model has learnt what nanoGPT learns: steps and seconds of ``train.py`` to the same validation loss."""

import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.bench.curves import Curve, TimeToLoss, Trained, read_result, require_drawing
from lightning_gpt.bench.tax import machine_facts, require_positive, require_writable, train_unseen, write_result
from lightning_gpt.cli import parse_train
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.models import GPTModule

TRIAL_STEPS = 10
_EVERY_RUN = "--devices=1 --eval_batches=0 --logger=none --sample_tokens=0 --trainer.enable_progress_bar=false"


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        flags: What ``train.py`` gets beside the recipe's.
        steps: Length of the run and of its schedule, optimizer steps.
        eval_interval: Optimizer steps between validations, which is how finely a loss is placed.
    """

    flags: str
    steps: int
    eval_interval: int

    def shortened(self, steps: int, *, longest: int) -> "Row":
        """The same where the longest row has so many steps."""
        return Row(self.flags, *(max(1, number * steps // longest) for number in (self.steps, self.eval_interval)))


@dataclass(frozen=True)
class Recipe:
    """What all rows share.

    Attributes:
        flags: What ``train.py`` gets for every row.
        device: Where it trains, "cpu" or "cuda".
        rows: By name; the first that is run is what the others are compared with.
        goal: The loss to reach; None for that of the first row at its end.
    """

    flags: str
    device: str
    rows: dict[str, Row]
    goal: float | None = None


_NANOGPT = "--implementation=nanogpt --dropout=0 --bias=false"
_MODERNGPT = "--implementation=moderngpt --bigram=1021 --smear=true --beta2=0.95"

# Rates, their ends, decay and warm-up are tuned, each row's for itself, except where a row is as published.
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
    # In bfloat16 and compiled, as nanoGPT trains where there is a GPU.
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
    """Fills a curve.

    The clock runs from the first step of a stretch, when its batch is there, to the validation that ends the stretch:
    a batch of the whole stretch is fetched outside of the time, and every step counts, the first of the run as well.
    """

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.val_tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Starts the clock, at the beginning and after a validation and its saving."""
        if self._since is None:
            self._since = _now(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock when the device has done all steps."""
        assert self._since is not None
        self._seconds += _now(pl_module) - self._since
        self._since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes down what the validation found."""
        assert isinstance(pl_module, GPTModule)
        self.val_tokens = pl_module.val_tokens
        self.curve.steps.append(trainer.global_step)
        self.curve.seconds.append(self._seconds)
        self.curve.losses.append(float(trainer.callback_metrics["val_loss"]))


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def measure_time_to_loss(
    *,
    data: str,
    recipe: str = "cpu",
    rows: str | None = None,
    seeds: int = 3,
    steps: int | None = None,
    threads: int | None = None,
    json: str | None = None,
    plot: str | None = None,
    from_file: str | None = None,
) -> TimeToLoss:
    """Trains every row with every seed through ``train.py``'s own path, and says when each reached the target.

    Each row is first tried for a few steps, which are thrown away: what cannot run is told before anything is
    measured, and no row pays for what a process does but once. Then all rows are trained with the first seed, all with
    the second, and so on, so that a machine that slows down does so for all.

    Args:
        data: What ``--data`` of ``train.py`` takes.
        recipe: A name of ``RECIPES``.
        rows: Names of its rows, separated by commas; None for all. The first is what the others are compared with.
        seeds: How many runs of each row.
        steps: Optimizer steps of the recipe's longest rows; the others are shortened alike. None for all steps.
        threads: Threads that torch computes with; None for torch's own choice.
        json: Where the result is written as JSON as well, again after each seed.
        plot: Where the curves are drawn, as PNG.
        from_file: An earlier result, in place of training.

    Raises:
        UserError: An option makes no sense, a row cannot be trained here, or a file cannot be read or written.
    """
    require_positive(seeds=seeds, steps=steps, threads=threads)
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe} is unknown; choose one of {', '.join(RECIPES)}")
    chosen = _chosen(recipe, rows=rows, steps=steps)
    for flag, file in (("json", json), ("plot", plot)):
        require_writable(file, flag=flag)
    if plot:
        require_drawing()
    if from_file:
        found = read_result(from_file)
    else:
        asked = {"data": data, "recipe": recipe, "rows": rows, "seeds": seeds, "steps": steps, "threads": threads}
        command = ["python bench.py time_to_loss", *(f"--{k} {v}" for k, v in asked.items() if v is not None)]
        found = _measure(" ".join(command), recipe, chosen, data=data, seeds=seeds, threads=threads, json=json)
    write_result(json, found.to_dict())
    if plot:
        found.draw(plot)
    return found


def _chosen(recipe: str, *, rows: str | None, steps: int | None) -> dict[str, Row]:
    known = RECIPES[recipe].rows
    names = [name.strip() for name in rows.split(",")] if rows else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--rows {unknown[0]} is unknown; choose of {', '.join(known)}")
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
        raise UserError(f"--recipe {recipe} trains on a GPU and none is found here; give --recipe cpu")
    flags = {
        name: [
            *f"{_EVERY_RUN} {shared.flags} {row.flags}".split(),
            f"--max_steps={row.steps}",
            f"--eval_interval={row.eval_interval}",
        ]
        for name, row in rows.items()
    }
    for own in flags.values():  # all of them, before the first is tried
        parse_train(own)
    before = torch.get_num_threads()
    threads = threads or before
    facts = machine_facts(device, threads)
    found = TimeToLoss(command, recipe, shared.goal, 0, facts, {name: Trained(own) for name, own in flags.items()})
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
                found.val_tokens = recorder.val_tokens
                found.rows[name].curves.append(curve)
                said = f"{name}, seed {seed}: loss {curve.losses[-1]:.4f} after {curve.seconds[-1]:.1f} s of training"
                print(said, file=sys.stderr, flush=True)
            write_result(json, found.to_dict())  # a benchmark of an hour that is stopped leaves what it has
    finally:
        torch.set_num_threads(before)
    return found


def _run(flags: list[str], recorder: _Recorder) -> None:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as folder:
        train_unseen(parse_train([*flags, f"--out_dir={folder}"]), recorder)
