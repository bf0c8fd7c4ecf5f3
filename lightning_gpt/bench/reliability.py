"""``bench.py reliability``: kills, signals, full disks, damaged files and long runs, on CPU ranks."""

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench import faults, mutations
from lightning_gpt.bench import kills as killing
from lightning_gpt.bench.endurance import train_long
from lightning_gpt.bench.faults import fill_disk, send_signals
from lightning_gpt.bench.kills import RANKS, kill_runs
from lightning_gpt.bench.mutations import mutate_files
from lightning_gpt.bench.report import machine_facts, require_positive, write_result
from lightning_gpt.config import UserError

PARTS = ("kills", "files", "signals", "disk", "endurance")
_TEXT = "".join(f"{n} green bottles hanging on the wall, and if {n} should fall\n" for n in range(400))


class Line(Protocol):
    """A line of the result."""

    def row(self) -> str:
        """Return the line as text."""

    def to_dict(self) -> dict[str, Any]:
        """Return the line, ready for JSON."""


@dataclass(frozen=True)
class Reliability:
    """Result of the benchmark.

    Attributes:
        parts: Lines of each part that was measured.
        machine: Hardware and versions.
    """

    parts: dict[str, Sequence[Line]]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return all lines, ready for JSON."""
        parts = {part: [line.to_dict() for line in lines] for part, lines in self.parts.items()}
        return {"benchmark": "reliability", "machine": self.machine} | parts

    def table(self) -> str:
        """Return the result as text."""
        headings = {
            "kills": killing.HEADING,
            "files": mutations.HEADING,
            "signals": faults.HEADING,
            "disk": faults.HEADING,
            "endurance": "endurance",
        }
        rows = []
        for part, lines in self.parts.items():
            rows += [headings[part], *(line.row() for line in lines), ""]
        m = self.machine
        return "\n".join([*rows, f"{m['hardware']}, {m['cores']} cores; torch {m['torch']}, python {m['python']}"])


def measure_reliability(
    *,
    parts: str,
    kills: int,
    rank_kills: int,
    strategies: str,
    files: int,
    steps: int,
    corpus_gb: float,
    seed: int,
    json: str | None,
) -> Reliability:
    """Break training runs and files in every way that a week brings, and record what happens.

    Args:
        parts: Parts to measure, separated by commas.
        kills: Number of kills of a single process.
        rank_kills: Number of kills of two ranks, for each strategy.
        strategies: Strategies of the kills and signals, separated by commas; "single" is one process.
        files: Number of mutated files.
        steps: Optimizer steps of the long run.
        corpus_gb: Size of its corpus, in 10^9 bytes.
        seed: Seed of all random choices.
        json: File for the result, or None.

    Raises:
        UserError: An option is wrong, or the system is not Linux.
    """
    if sys.platform != "linux":
        raise UserError("bench.py reliability needs Linux: it forks processes and reads /proc")
    require_positive(kills=kills, rank_kills=rank_kills, files=files, steps=steps)
    require_writable(json)
    chosen = _known(parts, PARTS, flag="parts")
    names = _known(strategies, RANKS, flag="strategies")
    torch.set_num_threads(1)  # threads of torch would not survive a fork
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as temporary, _own_cache(Path(temporary)):
        folder = Path(temporary)
        data = folder / "text.txt"
        data.write_text(_TEXT, encoding="ascii")
        measures: dict[str, Callable[[], Sequence[Line]]] = {
            "kills": lambda: [
                kill_runs(
                    name,
                    kills=kills if name == "single" else rank_kills,
                    data=data,
                    folder=_new(folder / "kills"),
                    draw=random.Random(f"{seed}/{name}"),
                )
                for name in names
            ],
            "files": lambda: mutate_files(count=files, data=data, folder=_new(folder / "files"), seed=seed),
            "signals": lambda: send_signals(data=data, folder=_new(folder / "signals"), strategies=names),
            "disk": lambda: fill_disk(data=data, folder=_new(folder / "disk")),
            "endurance": lambda: [
                train_long(steps=steps, corpus_bytes=int(corpus_gb * 1e9), data=data, folder=_new(folder / "endurance"))
            ],
        }
        results: dict[str, Sequence[Line]] = {}
        machine = machine_facts(torch.device("cpu"), 1)
        for part in chosen:
            results[part] = measures[part]()
            print(f"{part}: done", file=sys.stderr)
            write_result(json, Reliability(results, machine).to_dict())
    return Reliability(results, machine)


def _known(names: str, choices: Collection[str], *, flag: str) -> list[str]:
    """Return the names of a list separated by commas; raise a UserError for an unknown one."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in choices:
            raise UserError(f"--{flag} {name} is unknown; choose from {', '.join(choices)}")
    return found


def _new(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Keep tokens, and the list of this machine's runs, out of the user's cache."""
    name, before = "LIGHTNING_GPT_CACHE", os.environ.get("LIGHTNING_GPT_CACHE")
    os.environ[name] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
