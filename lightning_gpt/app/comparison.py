"""What the Compare page shows, as rows of tables."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_gpt.bench.measurements import QUANTITIES, Measurement, is_strategy_table, read_measurements
from lightning_gpt.config import UserError

BASELINE = "ddp"
PLANNED = ", planned"  # ends the name of a source that is a prediction
_PLANNED_FILE = "_planned"  # ends the name of a file of bench.py plan --csv


@dataclass(frozen=True)
class Choice:
    """What the controls of the page select.

    Attributes:
        sources: Names of sources.
        strategies: Names of strategies.
        checkpointing: Whether blocks recompute their activations.
    """

    sources: Collection[str]
    strategies: Collection[str]
    checkpointing: bool

    def of(self, measured: Iterable[Measurement]) -> list[Measurement]:
        """Return the selected measurements."""
        return [
            m
            for m in measured
            if m.source in self.sources and m.strategy in self.strategies and m.checkpointing == self.checkpointing
        ]


def short_name(strategy: str) -> str:
    """Return "ZeRO-2 offload" for "deepspeed_stage_2_offload", so that names fit beside bars on a phone."""
    return strategy.replace("deepspeed_stage_", "ZeRO-").replace("_", " ")


def read_all(folder: Path) -> tuple[list[Measurement], list[str]]:
    """Read all tables of strategies in a folder, and the predictions in them.

    Returns:
        The measurements, and what is wrong with files that cannot be read.
    """
    measured: list[Measurement] = []
    problems = []
    for file in sorted(folder.glob("*.csv")):
        try:
            if is_strategy_table(file):
                source = file.stem.removesuffix(_PLANNED_FILE) + PLANNED * file.stem.endswith(_PLANNED_FILE)
                measured += [replace(m, source=source) for m in read_measurements(file)]
        except (UserError, OSError, ValueError) as error:
            problems.append(str(error))
    predicted = [
        replace(
            m,
            source=m.source + PLANNED,
            peak_gib=m.planned_gib,
            largest_batch=None,
            tokens_per_second=None,
            status="ok",
        )
        for m in measured
        if m.planned_gib is not None
    ]
    return measured + predicted, problems


def points(measured: Sequence[Measurement], quantity: str) -> list[dict[str, Any]]:
    """Return a row for each measurement of a quantity, to draw it over the number of parameters.

    Args:
        measured: The measurements.
        quantity: A key of ``QUANTITIES``.
    """
    value = QUANTITIES[quantity].value
    rows = [
        {
            "source": m.source,
            "size": m.size,
            "parameters": m.parameters,
            "strategy": short_name(m.strategy),
            "value": value(m),
        }
        for m in measured
    ]
    return [row for row in rows if row["value"] is not None]


def sizes(measured: Sequence[Measurement]) -> list[str]:
    """Return the names of sizes with at least one measurement, smallest first, each as ``SOURCE: SIZE``."""
    ordered = sorted(measured, key=lambda m: (m.source, m.parameters))
    return list(dict.fromkeys(_label(m) for m in ordered if m.peak_gib is not None))


def _label(m: Measurement) -> str:
    return f"{m.source}: {m.size}"


def relative_to_baseline(measured: Sequence[Measurement], label: str) -> list[dict[str, Any]]:
    """Return each quantity of each strategy at one size, divided by that of DDP; none if DDP was not measured.

    Args:
        measured: The measurements of one switch position.
        label: One of ``sizes``.
    """
    at_size = [m for m in measured if _label(m) == label]
    base = next((m for m in at_size if m.strategy == BASELINE), None)
    rows = []
    for name, quantity in QUANTITIES.items():
        reference = quantity.value(base) if base else None
        for m in at_size:
            value = quantity.value(m)
            if reference and value is not None:
                rows.append(
                    {
                        "strategy": short_name(m.strategy),
                        "quantity": name,
                        "value": value,
                        "relative": value / reference,
                    }
                )
    return rows


def largest_models(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the largest model that ran under each strategy, by source; and the smallest that did not, if any."""
    rows = []
    for source, strategy in dict.fromkeys((m.source, m.strategy) for m in measured):
        mine = [m for m in measured if (m.source, m.strategy) == (source, strategy)]
        fitted = max((m for m in mine if m.peak_gib is not None), key=lambda m: m.parameters, default=None)
        failed = min((m for m in mine if m.peak_gib is None), key=lambda m: m.parameters, default=None)
        rows.append(
            {
                "source": source,
                "strategy": short_name(strategy),
                "parameters": fitted.parameters if fitted else 0,
                "size": fitted.size if fitted else "none",
                "did not run": f"{failed.size}: {failed.status}" if failed else "",
            }
        )
    return rows
