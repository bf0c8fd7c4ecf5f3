"""How soon a model has learnt what nanoGPT learns: steps and seconds of ``train.py`` to the same validation loss."""

import gc
import json as json_format
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.benchmarks import (
    machine_facts,
    require_positive,
    require_writable,
    spread,
    train_unseen,
    write_result,
)
from lightning_gpt.cli import parse_train
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.models import GPTModule

TRIAL_STEPS = 10
_EVERY_RUN = "--devices=1 --logger=none --sample_tokens=0 --trainer.enable_progress_bar=false"


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


# Learning rates are tuned, each row's for itself, except where a row is as published.
RECIPES = {
    "cpu": Recipe(
        "--accelerator=cpu --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --beta2=0.99"
        " --warmup_steps=100 --weight_decay=0.1 --gradient_clip_val=1",
        "cpu",
        {
            "nanogpt-published": Row(
                "--implementation=nanogpt --dropout=0 --bias=false --learning_rate=1e-3 --min_learning_rate=1e-4",
                2000,
                100,
            ),
            "nanogpt-adamw": Row(
                "--implementation=nanogpt --dropout=0 --bias=false --learning_rate=3e-3 --min_learning_rate=3e-4",
                2000,
                100,
            ),
            "nanogpt-muon": Row(
                "--implementation=nanogpt --dropout=0 --bias=false --optimizer=muon --learning_rate=3e-3", 2000, 100
            ),
            "moderngpt-adamw": Row("--implementation=moderngpt --learning_rate=3e-3", 2000, 100),
            "moderngpt-muon": Row("--implementation=moderngpt --optimizer=muon --learning_rate=3e-3", 2000, 100),
            "moderngpt-muon-250": Row(
                "--implementation=moderngpt --optimizer=muon --learning_rate=3e-3 --warmup_steps=25", 250, 25
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
            "moderngpt-muon": Row("--implementation=moderngpt --optimizer=muon --learning_rate=1e-3", 5000, 100),
        },
        goal=1.47,
    ),
}


@dataclass
class Curve:
    """The validations of one run.

    Attributes:
        seed: Its ``--seed``.
        steps: Optimizer steps before each validation.
        seconds: Training time before it: no validation, no saving, and nothing that comes before the first step.
        losses: Mean loss over the whole validation split, nats per token.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def first_at(self, loss: float) -> int | None:
        """Which validation was the first to find at most this loss; None where none did."""
        return next((number for number, found in enumerate(self.losses) if found <= loss), None)


@dataclass
class Trained:
    """The runs of a row.

    Attributes:
        flags: What ``train.py`` got, but for the data, the folder and the seed.
        curves: A run of each seed.
    """

    flags: list[str]
    curves: list[Curve] = field(default_factory=list)


@dataclass
class TimeToLoss:
    """What was measured.

    Attributes:
        command: What was asked for.
        recipe: Name of the recipe.
        goal: The loss to reach; None for the first row's at its end, the mean over the seeds.
        val_tokens: How many tokens each validation scored.
        machine: Hardware and versions.
        rows: By name; all have the same seeds.
    """

    command: str
    recipe: str
    goal: float | None
    val_tokens: int
    machine: dict[str, Any]
    rows: dict[str, Trained]

    @property
    def target(self) -> float:
        """The loss that every row is to reach, nats per token."""
        first = next(iter(self.rows.values()))
        return self.goal if self.goal is not None else statistics.mean(curve.losses[-1] for curve in first.curves)

    def reached(self, name: str) -> list[tuple[int, float] | None]:
        """The steps and seconds after which each seed of a row was first seen at the target; None where never.

        What the first row has at its end it has, by definition, at its end.
        """
        places = []
        for curve in self.rows[name].curves:
            is_measure = self.goal is None and name == next(iter(self.rows))
            at = len(curve.steps) - 1 if is_measure else curve.first_at(self.target)
            places.append(None if at is None else (curve.steps[at], curve.seconds[at]))
        return places

    def summary(self, name: str) -> dict[str, Any]:
        """What is told of a row: spreads over the seeds; of those alone that got there where it is about the target."""
        curves, reached = self.rows[name].curves, self.reached(name)
        pairs = [(own, first) for own, first in zip(reached, self.reached(next(iter(self.rows))), strict=True)]
        there = [own for own in reached if own]
        ratios = [(own[0] / first[0], own[1] / first[1]) for own, first in pairs if own and first]
        return {
            "last_loss": _told([curve.losses[-1] for curve in curves]),
            "ms_per_step": _told([curve.seconds[-1] / curve.steps[-1] * 1e3 for curve in curves]),
            "seeds_that_reached": len(there),
            "steps_to_target": _told([steps for steps, _ in there]),
            "seconds_to_target": _told([seconds for _, seconds in there]),
            "steps_ratio": _told([steps for steps, _ in ratios]),
            "seconds_ratio": _told([seconds for _, seconds in ratios]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, and what follows from it, in plain types."""
        head = {"benchmark": "time_to_loss"} | {k: v for k, v in vars(self).items() if k != "rows"}
        rows = {name: self.summary(name) | asdict(trained) for name, trained in self.rows.items()}
        return head | {"target": self.target, "rows": rows}

    def table(self) -> str:
        """The same for people."""
        to = f"to {self.target:.3f}"
        lines = [
            f"{'row':19}{'loss at the end':>21}{f'steps {to}':>18}{f'seconds {to}':>19}{'ms/step':>18}"
            f"{'steps, ratio':>21}{'seconds, ratio':>21}"
        ]
        notes = []
        for name, trained in self.rows.items():
            told = self.summary(name)
            lines.append(
                f"{name:19}{_shown(told['last_loss'], 3):>21}{_shown(told['steps_to_target'], 0):>18}"
                f"{_shown(told['seconds_to_target'], 1):>19}{_shown(told['ms_per_step'], 1):>18}"
                f"{_shown(told['steps_ratio'], 3):>21}{_shown(told['seconds_ratio'], 3):>21}"
            )
            curve = trained.curves[0]
            notes.append(
                f"{name}: {curve.steps[-1]} steps, a validation every {curve.steps[0]};"
                f" {told['seeds_that_reached']} of {len(trained.curves)} seeds reached {self.target:.3f}"
            )
        m = self.machine
        return "\n".join(
            [
                *lines,
                *notes,
                "mean (lowest to highest) over the seeds; ratios are to the first row, seed by seed",
                f"each validation scored {self.val_tokens:,} tokens, outside of the time; {m['hardware']},"
                f" {m['cores']} cores, {m['threads']} threads",
                f"torch {m['torch']}, lightning {m['lightning']}, python {m['python']}",
            ]
        )

    def draw(self, file: str) -> None:
        """Draws validation loss over seconds and over steps, with a band over the seeds, as PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.4), dpi=100, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for name, trained in self.rows.items():
            losses = np.array([curve.losses for curve in trained.curves])
            seconds = np.mean([curve.seconds for curve in trained.curves], axis=0)
            for axis, x in zip(axes, (seconds, trained.curves[0].steps), strict=True):
                [line] = axis.plot(x, losses.mean(axis=0), label=name, linewidth=1.5, marker=".", markersize=4)
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25)
        for axis, label in zip(axes, ("seconds of training", "optimizer steps"), strict=True):
            axis.axhline(self.target, color="0.3", linestyle="--", linewidth=1)
            axis.set(xlabel=label, xscale="log")
            axis.grid(which="both", linewidth=0.4, alpha=0.5)
        axes[0].set_ylabel("validation loss, nats per token")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, format="png")


def _told(values: Sequence[float]) -> dict[str, float] | None:
    """What is told of a number that each seed has; None where none has it."""
    return {"mean": statistics.mean(values)} | spread(list(values)) if values else None


def _shown(told: dict[str, float] | None, digits: int) -> str:
    if told is None:
        return "never"
    mean, low, high = (f"{told[name]:.{digits}f}" for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}-{high})"


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
        _require_drawing()
    if from_file:
        found = _read(from_file)
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


def _require_drawing() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--plot needs the package matplotlib: pip install -r requirements/bench.txt") from None


def _read(file: str) -> TimeToLoss:
    try:
        found = json_format.loads(Path(file).read_text(encoding="utf-8"))
        rows = {
            name: Trained(row["flags"], [Curve(**curve) for curve in row["curves"]])
            for name, row in found["rows"].items()
        }
        head = {name: found[name] for name in ("command", "recipe", "goal", "val_tokens", "machine")}
    except OSError as error:
        raise UserError(f"--from {file}: {error.strerror}; give what --json of this benchmark wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--from {file} is not what --json of this benchmark wrote") from error
    return TimeToLoss(**head, rows=rows)


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
    flags = {name: [*_EVERY_RUN.split(), *shared.flags.split(), *row.flags.split()] for name, row in rows.items()}
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
            for name, row in rows.items():
                curve = Curve(seed)
                length = [f"--max_steps={row.steps}", f"--eval_interval={row.eval_interval}", "--eval_batches=0"]
                recorder = _Recorder(curve)
                _run([*flags[name], *length, f"--data={data}", f"--seed={seed}"], recorder)
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
