"""Read tables of strategies: those that ``bench.py strategies`` writes, and the one measured in 2021."""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gpt.config import UserError

_COLUMNS = {"strategy", "activation_checkpointing", "seconds_per_iteration", "peak_mib_per_gpu"}
# What the table of 2021 does not repeat in each row; the file beside it has it.
_SETTINGS_2021 = {"batch_per_gpu": 8, "block_size": 128, "gpus": 8}
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Measurement:
    """One combination of size, strategy and activation checkpointing.

    Attributes:
        source: Where it comes from, such as the name of the file.
        size: Name of the size.
        parameters: Number of parameters; NaN if unknown.
        n_layer: Number of blocks; 0 if unknown.
        strategy: Name of the strategy.
        checkpointing: Whether blocks recompute their activations.
        peak_gib: Peak memory per GPU or rank, in GiB; None if it did not fit.
        largest_batch: Largest batch per GPU or rank; None if unknown.
        tokens_per_second: Tokens per second over all ranks; None if unknown.
        status: "ok", or why there is no measurement.
        planned_gib: Peak memory that the planner predicts, in GiB; None if unknown.
    """

    source: str
    size: str
    parameters: float
    n_layer: int
    strategy: str
    checkpointing: bool
    peak_gib: float | None = None
    largest_batch: float | None = None
    tokens_per_second: float | None = None
    status: str = "ok"
    planned_gib: float | None = None


@dataclass(frozen=True)
class Quantity:
    """A quantity to compare strategies by.

    Attributes:
        title: Name with its unit.
        value: Returns it for a measurement; None if unknown.
    """

    title: str
    value: Callable[[Measurement], float | None]


QUANTITIES = {
    "peak memory": Quantity("peak memory per GPU, GiB", lambda m: m.peak_gib),
    "largest batch": Quantity("largest batch per GPU, sequences", lambda m: m.largest_batch),
    "throughput": Quantity("tokens per second, all GPUs", lambda m: m.tokens_per_second),
}


def is_strategy_table(file: Path) -> bool:
    """Return whether a CSV file has the columns of such a table."""
    with file.open(encoding="utf-8", newline="") as lines:
        return set(next(csv.reader(lines), ())) >= _COLUMNS


def read_measurements(file: Path) -> list[Measurement]:
    """Read a table of strategies.

    Raises:
        UserError: The file cannot be read, or is not such a table.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return [_measurement(row, source=file.stem) for row in csv.DictReader(lines)]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a table of bench.py strategies") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: not a table of bench.py strategies ({error!r})") from error


def _measurement(row: dict[str, Any], *, source: str) -> Measurement:
    def number(name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    parameters = _count(row.get("parameters", ""))
    mib, planned, seconds = map(number, ("peak_mib_per_gpu", "planned_mib_per_gpu", "seconds_per_iteration"))
    tokens = math.prod(number(name) or default for name, default in _SETTINGS_2021.items())
    return Measurement(
        source=source,
        size=row.get("size") or row["parameters"],
        parameters=parameters,
        n_layer=int(row.get("n_layer") or 0),
        strategy=row["strategy"],
        checkpointing=row["activation_checkpointing"] in ("1", "True", "true"),
        peak_gib=None if mib is None else mib / 1024,
        largest_batch=number("largest_batch_per_gpu"),
        tokens_per_second=tokens / seconds if seconds else None,
        status=row.get("status") or "ok",
        planned_gib=None if planned is None else planned / 1024,
    )


def _count(text: str) -> float:
    """Return 227e6 for "227M"."""
    found = re.fullmatch(r"([\d.]+)([KMB]?)", text.strip().upper())
    return float(found[1]) * _SCALES[found[2]] if found else math.nan
