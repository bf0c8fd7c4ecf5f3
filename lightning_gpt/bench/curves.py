"""What runs found whose losses were validated on the way: when each reached a loss, as a table, JSON and a picture."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.bench.tax import spread
from lightning_gpt.config import UserError


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
        flags: What ``train.py`` got, besides the data, the folder and the seed.
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
            f"{'row':19}{'loss at the end':>21}{f'steps {to}':>18}{'ratio':>7}{f'seconds {to}':>19}{'ratio':>21}"
            f"{'ms/step':>19}"
        ]
        lengths: dict[str, list[str]] = {}
        notes = []
        for name, trained in self.rows.items():
            told, curve = self.summary(name), trained.curves[0]
            steps_ratio = told["steps_ratio"] and told["steps_ratio"]["mean"]
            lines.append(
                f"{name:19}{_shown(told['last_loss'], 3):>21}{_shown(told['steps_to_target'], 0):>18}"
                f"{'-' if steps_ratio is None else format(steps_ratio, '.3f'):>7}"
                f"{_shown(told['seconds_to_target'], 1):>19}{_shown(told['seconds_ratio'], 3):>21}"
                f"{_shown(told['ms_per_step'], 1):>19}"
            )
            lengths.setdefault(f"{curve.steps[-1]} steps, validated every {curve.steps[0]}", []).append(name)
            there, seeds = told["seeds_that_reached"], len(trained.curves)
            if there < seeds:
                notes.append(f"{name}: {there} of {seeds} seeds reached {self.target:.3f}")
        m = self.machine
        return "\n".join(
            [
                *lines,
                *notes,
                *(f"{length}: {', '.join(names)}" for length, names in lengths.items()),
                "mean (lowest-highest) over the seeds; ratios are to the first row, seed by seed",
                f"each validation scored {self.val_tokens:,} tokens, outside of the time; {m['hardware']},"
                f" {m['cores']} cores, {m['threads']} threads",
                f"torch {m['torch']}, lightning {m['lightning']}, python {m['python']}",
            ]
        )

    def draw(self, file: str) -> None:
        """Draws validation loss over seconds and over steps, with a band over the seeds, as PNG."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
        from PIL import Image

        figure = Figure(figsize=(10, 4.4), dpi=100, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for name, trained in self.rows.items():
            losses = np.array([curve.losses for curve in trained.curves])
            seconds = np.mean([curve.seconds for curve in trained.curves], axis=0)
            for axis, x in zip(axes, (seconds, trained.curves[0].steps), strict=True):
                [line] = axis.plot(x, losses.mean(axis=0), label=name, linewidth=1.5, marker=".", markersize=4)
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25)
        for axis, label in zip(axes, ("seconds of training", "optimizer steps"), strict=True):
            axis.axhline(self.target, color="0.3", linestyle="--", linewidth=1, label=f"a loss of {self.target:.3f}")
            axis.set(xlabel=label, xscale="log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(linewidth=0.4, alpha=0.5)
        axes[0].set_ylabel("validation loss, nats per token")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        picture = BytesIO()
        figure.savefig(picture, format="png")
        # A palette makes the file a quarter as large.
        Image.open(picture).convert("RGB").quantize(128).save(file, format="PNG", optimize=True)


def _told(values: Sequence[float]) -> dict[str, float] | None:
    """What is told of a number that each seed has; None where none has it."""
    return {"mean": statistics.mean(values)} | spread(list(values)) if values else None


def _shown(told: dict[str, float] | None, digits: int) -> str:
    if told is None:
        return "-"
    mean, low, high = (f"{told[name]:.{digits}f}" for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}-{high})"


def read_result(file: str) -> TimeToLoss:
    """An earlier result.

    Args:
        file: What ``--json`` wrote.

    Raises:
        UserError: It cannot be read, or is something else.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
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


def require_drawing() -> None:
    """Checks that curves can be drawn, before there are any.

    Raises:
        UserError: The package for it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--plot needs the package matplotlib: pip install -r requirements/bench.txt") from None
