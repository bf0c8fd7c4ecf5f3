"""The loss curves of a run: collected as a logger, continued from run.json, thinned for it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import Logger

LOSSES = {"train": "train_loss", "validation": "val_loss"}
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Point:
    """One point of a loss curve.

    Attributes:
        step: Optimizer step.
        loss: Mean loss; None if it is not finite.
        seconds: Seconds of training so far, over all sessions of the run.
    """

    step: int
    loss: float | None
    seconds: float


Curves = dict[str, list[Point]]


class CurveLogger(Logger):
    """A logger that keeps the loss curves in memory. Lightning reads the values from the device for all loggers alike.

    Args:
        curves: The curves of earlier sessions.
        seconds: Seconds of training in earlier sessions.

    Attributes:
        latest: The value of each metric that was logged last.
    """

    def __init__(self, curves: Curves, *, seconds: float) -> None:
        super().__init__()
        self.curves = curves
        self.latest: dict[str, float] = {}
        self._earlier = seconds
        self._started = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the logger, which names no folder."""
        return "summary"

    @property
    def version(self) -> str:
        """Version of the log, of which there is one."""
        return "0"

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all sessions."""
        return self._earlier + time.monotonic() - self._started

    def start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: run.json lies beside config.yaml."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append the losses among the metrics of a step to the curves."""
        self.latest |= metrics
        for name, metric in LOSSES.items():
            if metric in metrics and step is not None:
                loss = float(metrics[metric])
                value = round(loss, 6) if math.isfinite(loss) else None
                self.curves[name].append(Point(step, value, round(self.seconds, 3)))


def curves_until(step: int, earlier: dict[str, Any]) -> tuple[Curves, float]:
    """Return the curves in a run.json up to a step, and the seconds until then; empty ones if they are damaged."""
    curves: Curves = {name: [] for name in LOSSES}
    try:
        for name in LOSSES:
            columns = earlier["curves"][name]
            points = zip(columns["step"], columns["loss"], columns["seconds"], strict=True)
            known = (Point(int(s), None if loss is None else float(loss), float(t)) for s, loss, t in points)
            curves[name] = [point for point in known if point.step <= step]
        last = max((point.seconds for points in curves.values() for point in points), default=0.0)
        return curves, float(earlier["seconds"]) if earlier["step"] == step else last
    except (LookupError, TypeError, ValueError):
        return {name: [] for name in LOSSES}, 0.0


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most 2,000 points, evenly spread over the steps; the last one is among them."""
    width = max(1.0, points[-1].step / (_MOST_POINTS - 1)) if points else 1.0
    return list({int(point.step / width): point for point in points}.values())


def columns(points: Sequence[Point]) -> dict[str, list[Any]]:
    """Return a curve as columns: step, loss and seconds."""
    return {
        "step": [point.step for point in points],
        "loss": [point.loss for point in points],
        "seconds": [point.seconds for point in points],
    }


def draw_curves(curves: Curves, *, title: str) -> Any:
    """Return a matplotlib figure of the loss curves over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    # A layout engine would measure every text, which takes as long as drawing.
    axis = figure.subplots(gridspec_kw={"left": 0.09, "right": 0.98, "bottom": 0.12, "top": 0.93})
    for name, marker, width in (("train", "", 0.8), ("validation", "o", 1.5)):
        known = [(point.step, point.loss) for point in thinned(curves[name]) if point.loss is not None]
        if known:
            steps, losses = zip(*known, strict=True)
            axis.plot(steps, losses, marker=marker, markersize=4, linewidth=width, label=f"{name} {losses[-1]:.4f}")
    axis.set(title=title, xlabel="optimizer steps", ylabel="loss (nats per token)")
    axis.title.set_fontsize("medium")
    axis.grid(linewidth=0.4, alpha=0.5)
    if axis.lines:
        axis.legend()
    return figure
