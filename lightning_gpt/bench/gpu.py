"""``bench.py gpu``: what one GPU must show, each step in a process of its own with a time limit."""

import json as json_format
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.gpu_steps import STEPS, Check
from lightning_gpt.bench.report import machine_facts, require_positive, write_result
from lightning_gpt.config import UserError

_PROGRAM = "from lightning_gpt.bench.gpu_steps import main; main()"


@dataclass(frozen=True)
class GpuReport:
    """Result of the benchmark.

    Attributes:
        checks: What was found out, in order.
        seconds: Time of each step that ran.
        machine: Hardware and versions.
    """

    checks: list[Check]
    seconds: dict[str, float]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        checks = [asdict(check) for check in self.checks]
        return {"benchmark": "gpu", "machine": self.machine, "seconds": self.seconds, "checks": checks}

    def table(self) -> str:
        """Return the result as a Markdown table, and the number of checks that passed."""
        rows = ["| step | check | result | asked | |", "|---|---|---|---|---|"]
        for check in self.checks:
            rows.append(f"| {check.step} | {check.name} | {check.value} | {check.asked} | {check.verdict} |")
        judged = [check for check in self.checks if check.passed is not None]
        m = self.machine
        rows.append(f"\n{sum(bool(check.passed) for check in judged)} of {len(judged)} checks passed; {m['hardware']},")
        rows.append(f"torch {m['torch']}, lightning {m['lightning']}, python {m['python']}")
        return "\n".join(rows)


def measure_gpu(*, steps: str | None, minutes: int, accelerator: str, json: str | None) -> GpuReport:
    """Run the steps and collect their checks: first, some at a time, those that time nothing, then the others alone.

    Args:
        steps: Names of steps, separated by commas; None for all.
        minutes: No step starts, or goes on, after this time.
        accelerator: "gpu", or "cpu" to try the steps with small models.
        json: File for the result, which is written after each step; or None.

    Raises:
        UserError: An option is wrong, or there is no GPU.
    """
    require_positive(minutes=minutes)
    require_writable(json)
    names = list(STEPS) if steps is None else [name.strip() for name in steps.split(",") if name.strip()]
    for name in names:
        if name not in STEPS:
            raise UserError(f"--steps {name} is unknown; choose from {', '.join(STEPS)}")
    if accelerator not in ("gpu", "cpu"):
        raise UserError(f"--accelerator {accelerator} is unknown; choose gpu or cpu")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("bench.py gpu needs an NVIDIA GPU; --accelerator cpu tries its steps with small models")
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    report = GpuReport([], {}, machine_facts(device, torch.get_num_threads()))
    end = time.monotonic() + 60 * minutes

    def run(name: str) -> tuple[list[Check], float]:
        started = time.monotonic()
        checks = list(_run(name, device=device, seconds=min(STEPS[name].seconds, end - started)))
        return checks, time.monotonic() - started

    for timed in (False, True):
        chosen = [name for name in names if STEPS[name].timed == timed]
        with ThreadPoolExecutor(1 if timed else _processes()) as pool:
            for name, (checks, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
                report.checks.extend(checks)
                report.seconds[name] = seconds
                for check in checks:
                    print(f"{check.verdict:8}{name}: {check.name} {check.value}", file=sys.stderr, flush=True)
                write_result(json, report.to_dict())
    return report


def _processes() -> int:
    """Return how many steps run at a time, each with four cores."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


def _run(name: str, *, device: torch.device, seconds: float) -> Iterator[Check]:
    """Run one step in a new process and yield its checks; one that fails, is late or breaks off is a check as well."""
    if seconds <= 0:
        yield Check(name, "ran", "no time was left", "", passed=False)
        return
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as folder:
        found, log = Path(folder, "checks.jsonl"), Path(folder, "log.txt")
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", _PROGRAM, name, device.type, str(found)]
        environment, problem = os.environ | {"PYTHONPATH": path}, None
        with log.open("wb") as output:
            streams: Any = {"stdout": output, "stderr": output}
            try:
                done = subprocess.run(command, cwd=folder, env=environment, timeout=seconds, **streams)
            except subprocess.TimeoutExpired:
                problem = f"stopped after {seconds:.0f} s"
            else:
                problem = f"exit code {done.returncode}: {_last_line(log)}" if done.returncode else None
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
        yield from (Check(**json_format.loads(line)) for line in lines)
        if problem:
            yield Check(name, "ran to its end", problem, "", passed=False)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no message")
