"""Draw the scores of several checkpoints, one panel for each kind of score."""

from dataclasses import dataclass
from typing import Any

from lightning_gpt.evaluation.report import HarnessScore, Report

_PER_ROW = 3  # panels side by side
_PANELS = ("loss", "bits_per_byte", "accuracy")  # perplexity shows the same as the loss
_UNITS = {"loss": "nats per token"}


@dataclass(frozen=True)
class Panel:
    """One kind of score.

    Attributes:
        title: What is shown.
        values: One for each checkpoint; None where it is unknown.
        errors: Standard errors; empty if there are none.
    """

    title: str
    values: list[float | None]
    errors: list[float | None]


def panels(report: Report) -> list[Panel]:
    """Return the panels of a chart: loss, bits per byte and accuracy, or each metric of each lm-eval task."""
    found: dict[str, Panel] = {}
    for i, score in enumerate(report.scores):
        for name, (value, error) in _named(score).items():
            blank: list[float | None] = [None] * len(report.scores)
            panel = found.setdefault(name, Panel(name, blank, list(blank)))
            panel.values[i], panel.errors[i] = value, error
    return list(found.values())


def _named(score: Any) -> dict[str, tuple[float, float | None]]:
    """Return values and their standard errors by title."""
    if not isinstance(score, HarnessScore):
        titles = {name: f"{name} ({_UNITS[name]})" if name in _UNITS else name for name in _PANELS}
        known = {titles[name]: getattr(score, name) for name in _PANELS}
        return {title: (value, None) for title, value in known.items() if value is not None}
    named = {}
    for task, numbers in score.tasks.items():
        for metric, value in numbers.items():
            name, _, rest = metric.partition(",")
            error = numbers.get(f"{name}_stderr,{rest}")
            if not name.endswith("_stderr") and isinstance(value, int | float):
                named[f"{task}: {metric}"] = (float(value), error if isinstance(error, float) else None)
    return named


def draw(report: Report) -> Any:
    """Return a matplotlib figure with a dot for each checkpoint in each panel, and the report's notes below."""
    from matplotlib.figure import Figure

    shown, names = panels(report), report.names()
    columns = min(len(shown), _PER_ROW)
    rows = -(-len(shown) // columns)
    height = 0.9 + 0.35 * len(names)
    size = (2.5 + 3 * columns, rows * height + 0.25 * len(report.notes))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    places = range(len(names))
    for axis, panel in zip(axes, shown, strict=False):
        for place, value, error in zip(places, panel.values, panel.errors, strict=True):
            if value is not None:
                axis.errorbar(value, place, xerr=error, fmt="o", color="tab:blue", capsize=3)
                axis.annotate(f"{value:.4f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center")
        axis.set_title(panel.title, fontsize="medium")
        axis.margins(x=0.25)
        axis.grid(axis="x", linewidth=0.4, alpha=0.5)
        axis.locator_params(axis="x", nbins=4)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    axes[0].set(yticks=places, yticklabels=names, ylim=(len(names) - 0.5, -0.7))
    if report.notes:
        figure.supxlabel("\n".join(f"note: {note}" for note in report.notes), fontsize="small")
    return figure
