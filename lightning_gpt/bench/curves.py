"""Validation curves: when they reach a target loss, as a table, JSON and picture."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.bench.report import spread
from lightning_gpt.config import UserError


@dataclass
class Curve:
    """Validations of one run.

    Attributes:
        seed: Seed of the run.
        steps: Optimizer steps before each validation.
        seconds: Training time before each validation, excluding start-up, saving and earlier validations.
        losses: Mean loss over the whole validation split, nats per token.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def first_at(self, loss: float) -> int | None:
        """Return the index of the first validation with at most this loss, or None."""
        return next((index for index, value in enumerate(self.losses) if value <= loss), None)


@dataclass
class Trained:
    """All runs of one row of the benchmark.

    Attributes:
        flags: Flags of train.py, without data, run folder and seed.
        curves: One curve per seed.
    """

    flags: list[str]
    curves: list[Curve] = field(default_factory=list)


@dataclass
class TimeToLoss:
    """Result of ``bench.py time_to_loss``.

    Attributes:
        command: Command line of the benchmark.
        recipe: Name of the recipe.
        goal: Target loss in nats per token; None means the baseline's final loss, averaged over the seeds.
        val_tokens: Number of tokens that each validation scores.
        machine: Hardware and versions.
        rows: Runs by row name, the baseline first; all rows use the same seeds.
    """

    command: str
    recipe: str
    goal: float | None
    val_tokens: int
    machine: dict[str, Any]
    rows: dict[str, Trained]

    @property
    def baseline(self) -> str:
        """Name of the first row."""
        return next(iter(self.rows))

    @property
    def target(self) -> float:
        """Target loss in nats per token."""
        if self.goal is not None:
            return self.goal
        return statistics.mean(curve.losses[-1] for curve in self.rows[self.baseline].curves)

    def reached(self, name: str) -> list[tuple[int, float] | None]:
        """Return the (steps, seconds) that each seed of a row needs to reach the target; None if it never does.

        Without a fixed goal, the baseline reaches the target at its end by definition.
        """
        defines_target = self.goal is None and name == self.baseline
        found: list[tuple[int, float] | None] = []
        for curve in self.rows[name].curves:
            index = len(curve.steps) - 1 if defines_target else curve.first_at(self.target)
            found.append(None if index is None else (curve.steps[index], curve.seconds[index]))
        return found

    def summary(self, name: str) -> dict[str, Any]:
        """Return a row's means and spreads over its seeds; those about the target skip seeds that never reach it."""
        curves, reached = self.rows[name].curves, self.reached(name)
        hits = [hit for hit in reached if hit]
        pairs = zip(reached, self.reached(self.baseline), strict=True)
        ratios = [(hit[0] / base[0], hit[1] / base[1]) for hit, base in pairs if hit and base]
        return {
            "last_loss": _mean_and_spread([curve.losses[-1] for curve in curves]),
            "ms_per_step": _mean_and_spread([curve.seconds[-1] / curve.steps[-1] * 1e3 for curve in curves]),
            "seeds_that_reached": len(hits),
            "steps_to_target": _mean_and_spread([steps for steps, _ in hits]),
            "seconds_to_target": _mean_and_spread([seconds for _, seconds in hits]),
            "steps_ratio": _mean_and_spread([steps for steps, _ in ratios]),
            "seconds_ratio": _mean_and_spread([seconds for _, seconds in ratios]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return settings, curves and their summaries, ready for JSON."""
        head = {"benchmark": "time_to_loss"} | {k: v for k, v in vars(self).items() if k != "rows"}
        rows = {name: self.summary(name) | asdict(trained) for name, trained in self.rows.items()}
        return head | {"target": self.target, "rows": rows}

    def table(self) -> str:
        """Return the result as text."""
        target = f"to {self.target:.3f}"
        lines = [
            f"{'row':19}{'final loss':>21}{f'steps {target}':>18}{'ratio':>7}{f'seconds {target}':>19}{'ratio':>21}"
            f"{'ms/step':>19}"
        ]
        lengths: dict[str, list[str]] = {}
        notes = []
        for name, trained in self.rows.items():
            summary, curve = self.summary(name), trained.curves[0]
            steps_ratio = summary["steps_ratio"] and summary["steps_ratio"]["mean"]
            lines.append(
                f"{name:19}{_text(summary['last_loss'], 3):>21}{_text(summary['steps_to_target'], 0):>18}"
                f"{'-' if steps_ratio is None else format(steps_ratio, '.3f'):>7}"
                f"{_text(summary['seconds_to_target'], 1):>19}{_text(summary['seconds_ratio'], 3):>21}"
                f"{_text(summary['ms_per_step'], 1):>19}"
            )
            lengths.setdefault(f"{curve.steps[-1]} steps, validated every {curve.steps[0]}", []).append(name)
            hits, seeds = summary["seeds_that_reached"], len(trained.curves)
            if hits < seeds:
                notes.append(f"{name}: {hits} of {seeds} seeds reached {self.target:.3f}")
        m = self.machine
        return "\n".join(
            [
                *lines,
                *notes,
                *(f"{length}: {', '.join(names)}" for length, names in lengths.items()),
                "mean (min-max) over the seeds; ratios to the first row, seed by seed",
                f"each validation scores {self.val_tokens:,} tokens and is not timed; {m['hardware']},"
                f" {m['cores']} cores, {m['threads']} threads",
                f"torch {m['torch']}, lightning {m['lightning']}, python {m['python']}",
            ]
        )

    def draw(self) -> Any:
        """Return a matplotlib figure of validation loss over seconds and over steps, with a band over the seeds."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator

        figure = Figure(figsize=(10, 4.4), dpi=100, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for name, trained in self.rows.items():
            losses = np.array([curve.losses for curve in trained.curves])
            seconds = np.mean([curve.seconds for curve in trained.curves], axis=0)
            for axis, x in zip(axes, (seconds, trained.curves[0].steps), strict=True):
                [line] = axis.plot(x, losses.mean(axis=0), label=name, linewidth=1.5, marker=".", markersize=4)
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25)
        for axis, label in zip(axes, ("seconds of training", "optimizer steps"), strict=True):
            axis.axhline(self.target, color="0.3", linestyle="--", linewidth=1, label=f"target {self.target:.3f}")
            axis.set(xlabel=label, xscale="log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(linewidth=0.4, alpha=0.5)
        axes[0].set_ylabel("validation loss, nats per token")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure


def _mean_and_spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": statistics.mean(values)} | spread(values) if values else None


def _text(summary: dict[str, float] | None, digits: int) -> str:
    if summary is None:
        return "-"
    mean, low, high = (f"{summary[name]:.{digits}f}" for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}-{high})"


def read_result(file: str) -> TimeToLoss:
    """Read an earlier result.

    Args:
        file: File that ``--json`` wrote.

    Raises:
        UserError: The file cannot be read, or is not a result.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = {
            name: Trained(row["flags"], [Curve(**curve) for curve in row["curves"]])
            for name, row in found["rows"].items()
        }
        head = {name: found[name] for name in ("command", "recipe", "goal", "val_tokens", "machine")}
    except OSError as error:
        raise UserError(f"--from {file}: {error.strerror}; give a file that --json wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--from {file}: not a result of time_to_loss; give a file that --json wrote") from error
    return TimeToLoss(**head, rows=rows)
