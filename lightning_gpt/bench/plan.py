"""``bench.py plan``: the planner's memory and time beside measurements that others published."""

import csv as csv_format
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lightning_gpt.atomic import atomic_file, require_writable
from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.parsing import read_yaml
from lightning_gpt.planning import Machine, Rates, Traces, largest_batch, step_time
from lightning_gpt.strategies import LIGHTNING_PRECISIONS, STRATEGIES
from lightning_gpt.strategies.cards import CARDS
from lightning_gpt.strategies.memory import MemoryRules

SETTINGS = Path(__file__).parents[2] / "results" / "strategies_8xa100_2021.yaml"
_NEEDED = ("n_layer", "strategy", "activation_checkpointing")
# Columns of a row that override the settings; the first four are fields of the model.
_OWN = ("n_head", "n_embd", "vocab_size", "block_size", "batch_size", "devices", "precision")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the runs were made, as a YAML file says it; a row of measurements may differ in some of it.

    Attributes:
        memory_gib: Memory of a device that a run's tensors can fill.
        devices: Number of cards.
        precision: Lightning's name of the precision.
        batch_size: Sequences per device.
        block_size: Tokens per sequence.
        implementation: Name of the model implementation.
        model: Fields of its config that are the same for all rows.
        strategies: Fields of memory rules by strategy, where they differ from those of our strategies.
        batch_multiple: The search for the largest batch tried multiples of this.
        card: The cards, a key of ``strategies.cards.CARDS``; empty if unknown, so that no time is planned.
        rates: Fields of ``planning.Rates``, where they differ from those of today's runs.
    """

    memory_gib: float
    devices: int = 8
    precision: str = "16-mixed"
    batch_size: int = 8
    block_size: int = 128
    implementation: str = "mingpt"
    model: dict[str, Any] = field(default_factory=dict)
    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_multiple: int = 1
    card: str = ""
    rates: dict[str, Any] = field(default_factory=dict)

    def rules(self, strategy: str) -> MemoryRules:
        """Return the memory rules of a strategy, as these runs used it."""
        rules = STRATEGIES[strategy].memory
        assert dataclasses.is_dataclass(rules)
        return dataclasses.replace(rules, **self.strategies.get(strategy, {}))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row, measured and planned. Measured values that the file lacks are None.

    Attributes:
        row: The row of the file, by column.
        peak: MiB per device that are planned.
        largest: Sequences per device that are planned to fit; None if the file has no such column.
        seconds: Of a step that are planned; None if the cards are unknown.
        measured_peak: MiB per device that were measured.
        measured_largest: Sequences per device that were found to fit.
        measured_seconds: Of a step that were measured.
    """

    row: dict[str, str]
    peak: float
    largest: int | None
    seconds: float | None
    measured_peak: float | None
    measured_largest: float | None
    measured_seconds: float | None

    @property
    def peak_deviation(self) -> float | None:
        """Planned peak relative to the measured one, minus 1."""
        return self.peak / self.measured_peak - 1 if self.measured_peak else None

    @property
    def largest_deviation(self) -> float | None:
        """Planned largest batch relative to the measured one, minus 1."""
        if self.largest is None or not self.measured_largest:
            return None
        return self.largest / self.measured_largest - 1

    @property
    def time_deviation(self) -> float | None:
        """Planned seconds of a step relative to the measured ones, minus 1."""
        return self.seconds / self.measured_seconds - 1 if self.seconds and self.measured_seconds else None


@dataclass(frozen=True)
class Comparisons:
    """All rows of a file."""

    rows: list[Comparison]
    _COLUMNS: ClassVar[str] = (
        f"{'layers':>6}  {'strategy':26}{'recompute':>9}{'peak MiB':>10}{'measured':>9}{'':>8}"
        f"{'largest':>8}{'measured':>9}{'':>8}{'ms':>8}{'measured':>9}{'':>8}"
    )

    def save(self, file: Path) -> None:
        """Write the rows with planned values in the place of measured ones."""
        own = ("parameters", "n_layer", "strategy", "activation_checkpointing")
        with atomic_file(file, mode="w") as out:
            writer = csv_format.writer(out, lineterminator="\n")
            writer.writerow([*own, "seconds_per_iteration", "peak_mib_per_gpu", "largest_batch_per_gpu"])
            for c in self.rows:
                seconds = "" if c.seconds is None else f"{c.seconds:.3f}"
                largest = "" if c.largest is None else c.largest
                writer.writerow([*(c.row.get(name, "") for name in own), seconds, f"{c.peak:.0f}", largest])

    def table(self) -> str:
        """Return planned values, measured values and their deviation as text, with a summary."""
        lines = [self._COLUMNS]
        for c in self.rows:
            recompute = "yes" if c.row["activation_checkpointing"] == "1" else "no"
            lines.append(
                f"{c.row['n_layer']:>6}  {c.row['strategy']:26}{recompute:>9}"
                f"{c.peak:10,.0f}{_number(c.measured_peak):>9}{_percent(c.peak_deviation):>8}"
                f"{_number(c.largest):>8}{_number(c.measured_largest):>9}{_percent(c.largest_deviation):>8}"
                f"{_ms(c.seconds):>8}{_ms(c.measured_seconds):>9}{_percent(c.time_deviation):>8}".rstrip()
            )
        return "\n".join(
            [
                *lines,
                _summary("peak", [c.peak_deviation for c in self.rows]),
                _summary("largest batch", [c.largest_deviation for c in self.rows]),
                _summary("time", [c.time_deviation for c in self.rows]),
            ]
        )


def compare_plans(*, against: str | None, settings: str | None, csv: str | None = None) -> Comparisons:
    """Plan each row of a file of measurements.

    Args:
        against: CSV file with the columns of ``results/strategies_8xa100_2021.csv``.
        settings: YAML file that says how the runs were made; None takes the one beside the CSV file, or else the one
            of the 2021 measurements.
        csv: File for the rows with planned values in the place of measured ones; or None.

    Raises:
        UserError: A file cannot be read or written, or a row or a setting is wrong.
    """
    if csv:
        require_writable(csv, flag="csv")
    if against is None:
        raise UserError("give --against FILE, such as results/strategies_8xa100_2021.csv")
    rows = _read_rows(Path(against))
    beside = Path(against).with_suffix(".yaml")
    given = read_settings(Path(settings) if settings else beside if beside.exists() else SETTINGS)
    traces: dict[tuple[Any, ...], Traces] = {}
    found = Comparisons([_compare(row, given, traces, place=f"{against}, row {n}") for n, row in enumerate(rows, 1)])
    if csv:
        found.save(Path(csv))
    return found


def read_settings(path: Path) -> Settings:
    """Return the settings in a YAML file; raise a UserError if one is unknown or has a wrong value."""
    content = read_yaml(path, flag="--settings ")
    if not isinstance(content, dict):
        raise UserError(f"--settings {path}: expected names and values")
    types = {f.name: f.type for f in dataclasses.fields(Settings)}
    for name, value in content.items():
        if name not in types:
            raise UserError(f"--settings {path}: {name} is unknown; choose among {', '.join(types)}")
        annotation = types[name]
        kind = annotation.__name__ if isinstance(annotation, type) and annotation.__name__ in _KINDS else "dict"
        expected, description = _KINDS[kind]
        number = isinstance(value, int | float)
        if isinstance(value, bool) or not isinstance(value, expected) or (number and value <= 0):
            raise UserError(f"--settings {path}: {name} is {value!r}; give {description}")
    if "memory_gib" not in content:
        raise UserError(f"--settings {path}: memory_gib is missing; give what a run can use of a device's memory")
    if (card := content.get("card", Settings.card)) and card not in CARDS:
        raise UserError(f"--settings {path}: card {card} is unknown; choose one of {', '.join(CARDS)}")
    names = [f.name for f in dataclasses.fields(Rates)]
    for name, value in content.get("rates", {}).items():
        if name not in names or isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UserError(f"--settings {path}: rates: give numbers from 0 for fields among {', '.join(names)}")
    if content.get("precision", Settings.precision) not in LIGHTNING_PRECISIONS:
        raise UserError(f"--settings {path}: precision: choose one of {', '.join(LIGHTNING_PRECISIONS)}")
    for strategy, fields in content.get("strategies", {}).items():
        known = _fields(strategy) if strategy in STRATEGIES else None
        if known is None:
            raise UserError(f"--settings {path}: strategy {strategy} is unknown; choose one of {', '.join(STRATEGIES)}")
        if not isinstance(fields, dict) or not fields.keys() <= known or not all(map(_is_count, fields.values())):
            raise UserError(f"--settings {path}: {strategy}: give numbers for fields among {', '.join(sorted(known))}")
    return Settings(**content)


_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a name"),
    "int": (int, "a whole number above 0"),
    "float": (int | float, "a number above 0"),
    "dict": (dict, "names and values"),
}


def _fields(strategy: str) -> set[str]:
    rules: Any = STRATEGIES[strategy].memory
    return {f.name for f in dataclasses.fields(rules)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"--against {path}: larger than {_MAX_BYTES >> 20} MiB; give a table of measurements")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in csv_format.DictReader(file)]
    except OSError as error:
        raise UserError(f"--against {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv_format.Error) as error:
        raise UserError(f"--against {path} is not a CSV file in UTF-8") from error
    if missing := [name for name in _NEEDED if not rows or name not in rows[0]]:
        raise UserError(f"--against {path}: no rows with the column {missing[0]}; it needs {', '.join(_NEEDED)}")
    return rows


def _value(row: dict[str, str], name: str, default: Any, *, place: str, kind: type = int) -> Any:
    """Return a number in a row, or the default if the cell is empty or missing."""
    text = row.get(name, "").strip()
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e9:
        raise UserError(f"{place}: {name} is {text}; give a number above 0")
    return value


def _compare(row: dict[str, str], given: Settings, traces: dict[tuple[Any, ...], Traces], *, place: str) -> Comparison:
    strategy, checkpointing = row["strategy"], row["activation_checkpointing"]
    if strategy not in STRATEGIES:
        raise UserError(f"{place}: strategy {strategy} is unknown; choose one of {', '.join(STRATEGIES)}")
    if checkpointing not in ("0", "1"):
        raise UserError(f"{place}: activation_checkpointing is {checkpointing}; give 0 or 1")
    devices = _value(row, "devices", given.devices, place=place)
    batch_size = _value(row, "batch_size", given.batch_size, place=place)
    precision = row.get("precision") or given.precision
    if precision not in LIGHTNING_PRECISIONS:
        raise UserError(f"{place}: precision {precision} is unknown; choose one of {', '.join(LIGHTNING_PRECISIONS)}")
    model = given.model | {"block_size": given.block_size}
    model |= {name: _value(row, name, model.get(name), place=place) for name in _OWN[:4]}
    model["n_layer"] = _value(row, "n_layer", None, place=place)
    key = (precision, *sorted(model.items()))
    if key not in traces:
        module = GPTModule.without_memory(given.implementation, model_config=model)
        traces[key] = Traces(
            module, block_size=model["block_size"], accumulate=1, precision=precision, device_type="cuda"
        )
    rules, recompute = given.rules(strategy), checkpointing == "1"
    trace = traces[key].step(rules, batch_size=batch_size, recompute=recompute)
    largest = None
    if "largest_batch_per_gpu" in row:
        largest = largest_batch(
            traces[key],
            rules=rules,
            world_size=devices,
            recompute=recompute,
            limit=int(given.memory_gib * 2**30),
            multiple=given.batch_multiple,
        )
    seconds = None
    if given.card:
        traffic, machine = rules.traffic(trace, ranks=devices), Machine(given.card, devices)
        seconds = step_time(trace, traffic, machine=machine, rates=Rates(**given.rates)).seconds
    return Comparison(
        row=row,
        peak=rules.memory(trace, ranks=devices).peak / 2**20,
        largest=largest,
        measured_peak=_value(row, "peak_mib_per_gpu", None, place=place, kind=float),
        measured_largest=_value(row, "largest_batch_per_gpu", None, place=place, kind=float),
        seconds=seconds,
        measured_seconds=_value(row, "seconds_per_iteration", None, place=place, kind=float),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def _summary(name: str, deviations: list[float | None]) -> str:
    """Return how many deviations are within 15 and 25 percent."""
    found = [abs(d) for d in deviations if d is not None]
    if not found:
        return f"{name}: nothing measured"
    within = ", ".join(f"{sum(d <= limit for d in found)} of {len(found)} within {limit:.0%}" for limit in (0.15, 0.25))
    return f"{name}: {within}, largest deviation {max(found):.1%}"
