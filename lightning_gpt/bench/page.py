"""``bench.py report``: one HTML file with all recorded results, which loads nothing from the network."""

import csv
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_gpt.atomic import atomic_file, require_writable
from lightning_gpt.bench.curves import read_result
from lightning_gpt.bench.measurements import QUANTITIES, Measurement, is_strategy_table, read_measurements
from lightning_gpt.charts import picture, require_matplotlib
from lightning_gpt.config import UserError

_LONGEST_TEXT = 60  # characters that do not hide the columns to the right
_LONGEST_LIST = 6  # numbers that are shown one by one
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap }
th { position: sticky; top: 0; background: #fff } th:first-child, td:first-child, .text { text-align: left }
svg { max-width: 100%; height: auto } .from { color: #555; font-size: 13px; overflow-wrap: anywhere }
details { margin: .5rem 0 } summary { cursor: pointer }
"""


@dataclass(frozen=True)
class Page:
    """What was written.

    Attributes:
        file: The page.
        problems: Files that cannot be read, each with the reason; the page says so too.
        count: Number of results.
    """

    file: Path
    problems: list[str]
    count: int

    def table(self) -> str:
        """Return the result as text."""
        size = self.file.stat().st_size / 1e3
        lines = [f"cannot be read: {problem}" for problem in self.problems]
        return "\n".join([*lines, f"{self.file}: {self.count} results, {size:,.0f} kB"])


def write_report(*, results: str, out: str) -> Page:
    """Write the page.

    Args:
        results: Folder with the results: .json and .csv files.
        out: File to write.

    Raises:
        UserError: There are no results, matplotlib is not installed, or the file cannot be written.
    """
    require_writable(out, flag="out")
    require_matplotlib(flag="out")
    folder = Path(results)
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".csv"))
    if not files:
        raise UserError(f"--results {results}: no .json or .csv file there; give a folder of results")
    sections, problems = [], []
    for file in files:
        try:
            sections.append(_section(file))
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {' '.join(str(error).split())}")
            sections.append(f"<p>cannot be read: {html.escape(str(error))}</p>")
    links = "".join(f'<li><a href="#{html.escape(f.name)}">{html.escape(f.name)}</a></li>' for f in files)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>lightning-gpt: results</title><style>{_STYLE}</style></head><body>",
        f"<h1>lightning-gpt: results</h1><p>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p><ul>{links}</ul>",
    ]
    for file, section in zip(files, sections, strict=True):
        parts.append(f'<h2 id="{html.escape(file.name)}">{html.escape(file.name)}</h2>{section}')
    with atomic_file(Path(out), mode="w") as page:
        page.write("\n".join([*parts, "</body></html>\n"]))
    return Page(Path(out), problems, len(files))


def _section(file: Path) -> str:
    """Return the charts and tables of one file."""
    notes = file.with_suffix(".md")
    about = f"<details><summary>about</summary><pre>{_escaped(notes)}</pre></details>" if notes.exists() else ""
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        same, differing = _split_constant(rows)
        charts = _strategy_charts(read_measurements(file)) if is_strategy_table(file) else ""
        return about + _provenance(same) + charts + _table(differing)
    found = json.loads(file.read_text(encoding="utf-8"))
    chart = ""
    if isinstance(found, dict) and found.get("benchmark") == "time_to_loss":
        chart = _svg(read_result(str(file)).draw())
    return about + chart + _anything(found)


def _escaped(file: Path) -> str:
    return html.escape(file.read_text(encoding="utf-8"))


def _split_constant(rows: Sequence[dict[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the columns that are the same in all rows, and the rows without them."""
    names = list(rows[0]) if len(rows) > 1 else []
    same = {name: rows[0][name] for name in names if len({row[name] for row in rows}) == 1}
    return same, [{k: v for k, v in row.items() if k not in same} for row in rows]


def _strategy_charts(measured: Sequence[Measurement]) -> str:
    """Return a chart for each quantity: a line for each strategy, dashed with activation checkpointing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(QUANTITIES))
    strategies = list(dict.fromkeys(m.strategy for m in measured))
    for axis, quantity in zip(axes, QUANTITIES.values(), strict=True):
        for number, strategy in enumerate(strategies):
            for checkpointing in (False, True):
                points = [
                    (m.parameters / 1e6, quantity.value(m))
                    for m in measured
                    if (m.strategy, m.checkpointing) == (strategy, checkpointing) and quantity.value(m) is not None
                ]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    label = strategy + ", recompute" * checkpointing
                    axis.plot(x, y, "--" if checkpointing else "-", marker=".", color=f"C{number}", label=label)
        axis.set(title=quantity.title, xlabel="parameters, millions", xscale="log", yscale="log")
        axis.grid(linewidth=0.4, alpha=0.5)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return _svg(figure)


def _svg(figure: Any) -> str:
    drawn = picture(figure, form=".svg").decode()
    return re.sub(r"^.*?(?=<svg)", "", drawn, flags=re.DOTALL)


def _anything(value: Any, *, title: str = "") -> str:
    """Return any JSON value as HTML: single values as a line, lists and mappings of objects as tables."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _heading(title) + _table([_flat(item) for item in value])
    if not isinstance(value, dict):
        return _heading(title) + f"<p>{_cell(value)}</p>"
    if len(value) > 1 and all(isinstance(item, dict) for item in value.values()):
        return _heading(title) + _table([{title or "name": name, **_flat(item)} for name, item in value.items()])
    single = {k: v for k, v in value.items() if _is_single(v)}
    rest = {k: v for k, v in value.items() if k not in single}
    return _heading(title) + _provenance(single) + "".join(_anything(v, title=k) for k, v in rest.items())


def _heading(title: str) -> str:
    return f"<h3>{html.escape(title)}</h3>" if title else ""


def _is_single(value: Any) -> bool:
    """Return whether a value is shown in one line."""
    if isinstance(value, dict):
        return all(not isinstance(part, dict | list) for part in value.values())
    return not (isinstance(value, list) and any(isinstance(part, dict | list) for part in value))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the values that do not fit into a cell."""
    return {k: v for k, v in row.items() if _is_single(v)}


def _provenance(values: dict[str, Any]) -> str:
    lines = (f"{html.escape(str(name))}: {_cell(value)}" for name, value in values.items())
    return f'<p class="from">{"; ".join(lines)}</p>' if values else ""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: max(len(str(row.get(name))) for row in rows) > _LONGEST_TEXT)  # long texts last
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    body = "".join(f"<tr>{_cells(row.get(name) for name in columns)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(values: Iterable[Any]) -> str:
    return "".join(
        f"<td{' class=text' if isinstance(value, str) and not _is_number(value) else ''}>{_cell(value)}</td>"
        for value in values
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+\d.,e%]*", text) is not None


def _cell(value: Any) -> str:
    """Return a value as HTML text, with as many digits as a reader compares."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, dict):
        middle = next((value[name] for name in ("mean", "median") if name in value), None)
        if middle is not None and {"min", "max"} <= value.keys():
            return f"{_cell(middle)} ({_cell(value['min'])} to {_cell(value['max'])})"
        return ", ".join(f"{html.escape(str(name))} {_cell(part)}" for name, part in value.items())
    if isinstance(value, list):
        if len(value) <= _LONGEST_LIST or not all(isinstance(part, int | float) for part in value):
            return ", ".join(_cell(part) for part in value)
        return f"{len(value)} values ({_cell(min(value))} to {_cell(max(value))})"
    return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
