"""Functions shared by all benchmarks: check options, describe the machine, write the JSON file."""

import contextlib
import os
import platform
import statistics
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_gpt.atomic import atomic_file
from lightning_gpt.config import UserError


def require_positive(**counts: int | None) -> None:
    """Check options that count something.

    Args:
        counts: Values by flag name; None for a flag that was not given.

    Raises:
        UserError: A value is below 1.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: nothing to measure; give 1 or more")


def write_result(json: str | None, result: dict[str, Any]) -> None:
    """Write a result to the file that --json names, if any."""
    if json:
        with atomic_file(Path(json), mode="w") as file:
            file.write(dumps(result, indent=2) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine_facts(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the hardware and versions to report with a measurement.

    Args:
        device: Where the benchmark computes.
        threads: Number of torch threads.
    """
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "hardware": f"{torch.cuda.get_device_name(device)} and {cpu}" if device.type == "cuda" else cpu,
        "device": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }
