"""``bench.py strategies``: memory, speed and largest batch of each strategy, by real training steps."""

import csv as csv_format
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gpt.atomic import atomic_file, require_writable
from lightning_gpt.bench.forked import ForkedRun, in_child
from lightning_gpt.bench.gpu_runs import gibibytes, planned_peak, printed_by_training
from lightning_gpt.bench.probe import OUT_OF_MEMORY, Probe, Reading, read
from lightning_gpt.bench.report import machine_facts, require_positive
from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.strategies import STRATEGIES, find_devices, get_strategy

SIZES = {
    "10m": (6, 6, 384, 256),
    "50m": (8, 8, 512, 50304),
    "124m": (12, 12, 768, 50304),
    "350m": (24, 16, 1024, 50304),
    "774m": (36, 20, 1280, 50304),
    "1558m": (48, 25, 1600, 50304),
}
"""Layers, heads, width and vocabulary by name."""
_OWN_SIZE = re.compile(r"(\d+)/(\d+)/(\d+)(?:/(\d+))?")
_RECOMPUTE = {"off": (False,), "on": (True,), "both": (False, True)}
_DOUBLINGS = 16
_REFINEMENTS = 8  # the largest batch is found to an eighth of a power of two
_PLAN_SECONDS = 120
_OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "can't allocate memory", "MemoryError")


@dataclass(frozen=True)
class Sweep:
    """Result of the benchmark: a row for each combination, with its provenance.

    Attributes:
        rows: Values by column. Names are those of ``results/strategies_8xa100_2021.csv`` where they mean the same.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """Return the result as text."""
        lines = [
            f"{'size':15}{'strategy':27}{'recompute':>10}{'peak MiB':>10}{'planned':>9}{'s/step':>9}{'tokens/s':>10}"
            f"{'largest batch':>15}  status"
        ]
        for row in self.rows:
            shown = [
                _text(row[name], digits)
                for name, digits in (
                    ("peak_mib_per_gpu", 0),
                    ("planned_mib_per_gpu", 0),
                    ("seconds_per_iteration", 3),
                    ("tokens_per_second", 0),
                    ("largest_batch_per_gpu", 0),
                )
            ]
            peak, planned, seconds, speed, largest = shown
            recompute = "yes" if row["activation_checkpointing"] else "no"
            lines.append(
                f"{row['size']:15}{row['strategy']:27}{recompute:>10}{peak:>10}{planned:>9}{seconds:>9}{speed:>10}"
                f"{largest:>15}  {row['status']}"
            )
        return "\n".join(lines)

    def save(self, csv: str | None) -> None:
        """Write the rows to the file that --csv names, if any."""
        if csv and self.rows:
            with atomic_file(Path(csv), mode="w") as file:
                writer = csv_format.DictWriter(file, list(self.rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in self.rows)


@dataclass(frozen=True)
class _Settings:
    """What all combinations share.

    Attributes:
        flags: Flags of train.py.
        batch_size: Sequences per rank at which time and memory are read.
        block_size: Tokens per sequence.
        devices: Number of ranks.
        steps: Timed optimizer steps.
        seconds: Time limit of each group of processes.
        limit: Bytes that a rank may use; None for all there are.
        search: Whether to search for the largest batch.
        threads: Number of torch threads of each rank.
        on_cpu: Whether the ranks compute on the CPU.
        folder: Folder for runs and readings.
    """

    flags: list[str]
    batch_size: int
    block_size: int
    devices: int
    steps: int
    seconds: int
    limit: int | None
    search: bool
    threads: int | None
    on_cpu: bool
    folder: Path


def measure_strategies(
    *,
    sizes: str,
    strategies: str,
    recompute: str,
    implementation: str,
    batch_size: int,
    block_size: int,
    devices: int | None,
    accelerator: str,
    precision: str,
    steps: int,
    minutes: float,
    memory_gib: float | None,
    threads: int | None,
    csv: str | None,
) -> Sweep:
    """Train some steps of every combination of size, strategy and recomputation, each in processes of its own.

    Args:
        sizes: Keys of ``SIZES``, or LAYERS/HEADS/WIDTH or LAYERS/HEADS/WIDTH/VOCABULARY, separated by commas.
        strategies: Names, separated by commas; "all" for all.
        recompute: "off", "on" or "both".
        implementation: Name of the model.
        batch_size: Sequences per rank at which time and memory are read.
        block_size: Tokens per sequence.
        devices: Number of ranks; None for all GPUs, or 2 on a CPU.
        accelerator: "auto", "cpu" or "gpu".
        precision: As for train.py.
        steps: Timed optimizer steps.
        minutes: Time limit of each group of processes.
        memory_gib: GiB that a rank may use; None for all of a GPU. On a CPU, None also means that the largest batch is
            not searched for.
        threads: Number of torch threads of each rank; None for 1 on a CPU.
        csv: File for the result, which is written after each row; or None.

    Raises:
        UserError: An option is wrong.
    """
    given = {k: v for k, v in locals().items() if v is not None}
    require_positive(batch_size=batch_size, block_size=block_size, devices=devices, steps=steps, threads=threads)
    for name, value in (("minutes", minutes), ("memory_gib", memory_gib)):
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: give a number above 0")
    require_writable(csv, flag="csv")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has started CUDA cannot be forked
    gpus = torch.cuda.device_count()
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus)
    if on_cpu and sys.platform != "linux":
        raise UserError("bench.py strategies reads the memory of a CPU run from /proc, which only Linux has")
    devices = devices or (2 if on_cpu else gpus)
    shapes = {name: _shape(name) for name in _listed(sizes)}
    if recompute not in _RECOMPUTE:
        raise UserError(f"--recompute {recompute} is unknown; choose one of {', '.join(_RECOMPUTE)}")
    names = _strategies(strategies, devices)
    shared = [f"--accelerator={'cpu' if on_cpu else 'gpu'}", f"--devices={devices}", f"--precision={precision}"]
    for name in names:
        options = TrainerOptions(
            strategy=name, accelerator="cpu" if on_cpu else "gpu", devices=devices, precision=precision
        )
        get_strategy(options, where=find_devices(options))
    command = shlex.join(["bench.py", "strategies", *(f"--{k}={v}" for k, v in given.items())])
    sweep = Sweep()
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as folder:
        settings = _Settings(
            [*shared, f"--implementation={implementation}", f"--block_size={block_size}", *_EVERY_RUN.split()],
            batch_size,
            block_size,
            devices,
            steps,
            round(60 * minutes),
            None if memory_gib is None else int(memory_gib * 2**30),
            not on_cpu or memory_gib is not None,
            threads or (1 if on_cpu else None),
            on_cpu,
            Path(folder),
        )
        if on_cpu:  # else each rank's own imports would count as memory of its run
            for module in _IMPORTED + _BY_DEEPSPEED * any(STRATEGIES[name].deepspeed_engine for name in names):
                import_module(module)
        facts = in_child(_facts, settings)
        for size, shape in shapes.items():
            data = write_tokens(settings.folder, vocab_size=shape[3], block_size=block_size)
            for name in names:
                for again in _RECOMPUTE[recompute]:
                    row = _row(settings, shape, data=data, strategy=name, recompute=again)
                    common = {"implementation": implementation, "precision": precision}
                    provenance = {**facts, "command": command}
                    sweep.rows.append({"size": size, **row, **common, **provenance})
                    sweep.save(csv)
                    print(sweep.table().splitlines()[-1], file=sys.stderr, flush=True)
    return sweep


# What runs import after they have started.
_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
_BY_DEEPSPEED = ["deepspeed.runtime.engine", "torch._inductor.compile_fx", "networkx"]
_EVERY_RUN = (
    "--logger=none --sample_tokens=0 --trainer.enable_progress_bar=false --max_steps=1000000 --eval_interval=1000000"
    " --eval_batches=1 --log_every_n_steps=1000000 --overwrite"
)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shape(name: str) -> tuple[int, int, int, int]:
    """Return layers, heads, width and vocabulary."""
    own = _OWN_SIZE.fullmatch(name)
    if own:
        layers, heads, width = (int(part) for part in own.groups()[:3])
        return layers, heads, width, int(own[4] or 50304)
    if name not in SIZES:
        raise UserError(f"--sizes {name} is unknown; choose from {', '.join(SIZES)}, or give LAYERS/HEADS/WIDTH")
    return SIZES[name]


def _strategies(names: str, devices: int) -> list[str]:
    """Return the names; "all" excludes the one that means another, which is "auto" on several devices."""
    if names != "all":
        return _listed(names)
    with_deepspeed = find_spec("deepspeed") is not None
    chosen = [row.name for row in STRATEGIES.values() if with_deepspeed or not row.deepspeed_engine]
    return [name for name in chosen if name != ("auto" if devices > 1 else "ddp")]


def write_tokens(folder: Path, *, vocab_size: int, block_size: int) -> Path:
    """Write random tokens of a vocabulary into a folder of their own, unless it is there, and return it."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 100 * (block_size + 1), dtype=np.uint32)
    data = folder / f"tokens-{vocab_size}"
    if not data.exists():
        first, rest = np.split(tokens, [4 * block_size])
        write_token_files(data, train=rest, val=first, tokenizer=None, vocab_size=vocab_size, source="random")
    return data


def _facts(settings: _Settings) -> dict[str, Any]:
    """Return hardware and versions; in a child process, because they start CUDA."""
    device = torch.device("cpu" if settings.on_cpu else "cuda")
    found = machine_facts(device, settings.threads or torch.get_num_threads())
    return found | ({"deepspeed": version("deepspeed")} if find_spec("deepspeed") else {"deepspeed": ""})


def _row(
    settings: _Settings, shape: tuple[int, int, int, int], *, data: Path, strategy: str, recompute: bool
) -> dict[str, Any]:
    """Measure one combination."""
    layers, heads, width, vocabulary = shape
    flags = [*settings.flags, f"--data={data}", f"--strategy={strategy}", f"--batch_size={settings.batch_size}"]
    flags += [f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", f"--recompute={str(recompute).lower()}"]
    load, now = os.getloadavg()[0], datetime.now(UTC).isoformat(timespec="seconds")
    b = settings.batch_size
    readings, status = _attempt(settings, flags, [b], steps=settings.steps)
    first, largest = readings.get(b), None
    seconds = float(np.median(first[0].seconds)) if first and first[0].seconds else None
    if status == "ok" and settings.search:
        largest, ending = _largest_batch(settings, flags, b)
        status = status if largest else f"ok; largest batch: {ending}"
    tokens = b * settings.block_size * settings.devices
    parameters, planned = _planned(settings, flags)
    return {
        "parameters": parameters,
        "n_layer": layers,
        "strategy": strategy,
        "activation_checkpointing": int(recompute),
        "seconds_per_iteration": seconds and round(seconds, 4),
        "tokens_per_second": seconds and round(tokens / seconds, 1),
        "peak_mib_per_gpu": round(max(reading.peak for reading in first) / 2**20, 1) if first else None,
        "planned_mib_per_gpu": planned,
        "largest_batch_per_gpu": largest,
        "status": status,
        "n_head": heads,
        "n_embd": width,
        "vocab_size": vocabulary,
        "block_size": settings.block_size,
        "batch_per_gpu": b,
        "gpus": settings.devices,
        "memory_limit_mib": settings.limit and settings.limit // 2**20,
        "steps": settings.steps,
        "load": round(load, 1),
        "time": now,
    }


_FULL = "out of memory"


def _largest_batch(settings: _Settings, flags: list[str], known: int) -> tuple[int | None, str]:
    """Return the largest batch that fits, or None; and how the search ended.

    Args:
        settings: What all combinations share.
        flags: Flags of train.py.
        known: A batch size that fits.
    """
    doubled, ending = _attempt(settings, flags, [known * 2**k for k in range(1, _DOUBLINGS)], steps=0)
    if ending != _FULL:
        return None, ending
    last = max([known, *doubled])
    finer = sorted({last + last * k // _REFINEMENTS for k in range(1, _REFINEMENTS)} - {last})
    more, ending = _attempt(settings, flags, finer, steps=0) if finer else ({}, _FULL)
    return (max([last, *more]), ending) if ending in ("ok", _FULL) else (None, ending)


def _attempt(
    settings: _Settings, flags: list[str], batches: list[int], *, steps: int
) -> tuple[dict[int, list[Reading]], str]:
    """Train at each batch size until one fails.

    Returns:
        The readings of all ranks for each batch size that all ranks have completed; and how it ended: "ok", "out of
        memory", or what else has happened.
    """
    output, file = settings.folder / "output.txt", settings.folder / "readings.jsonl"
    for old in (output, file):
        old.unlink(missing_ok=True)
    probe = partial(Probe, batches, steps=steps, limit=settings.limit, file=file, threads=settings.threads)
    run = ForkedRun(
        [*flags, f"--out_dir={settings.folder / 'run'}"], ranks=settings.devices, output=output, make_callback=probe
    )
    try:
        ended = run.wait(timeout=settings.seconds)
    finally:
        run.kill()
    by_batch: dict[int, list[Reading]] = {}
    for reading in read(file):
        by_batch.setdefault(reading.batch, []).append(reading)
    complete = {batch: found for batch, found in by_batch.items() if len(found) == settings.devices}
    log = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    return complete, _ending(run, ended, log=log, seconds=settings.seconds, is_complete=set(batches) == set(complete))


def _ending(run: ForkedRun, ended: bool, *, log: str, seconds: int, is_complete: bool) -> str:
    if is_complete:
        return "ok"
    if not ended:
        return f"stopped after {seconds} s"
    codes = [process.exitcode for process in run.processes]
    if OUT_OF_MEMORY in codes or any(text in log for text in _OUT_OF_MEMORY):
        return _FULL
    if all(code == -9 for code in codes):
        return _FULL  # the system's own killer
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line or line.startswith("error: ")]
    return f"failed: {(told or lines or ['no message'])[-1][:200]}"


def _planned(settings: _Settings, flags: list[str]) -> tuple[int | None, float | None]:
    """Return what ``--dry_run`` says: parameters, and peak MiB of a rank (on a CPU, with its share of host memory)."""
    try:
        printed = in_child(printed_by_training, [*flags, "--dry_run"], timeout=_PLAN_SECONDS)
    except RuntimeError:
        return None, None
    found = planned_peak(printed)
    if settings.on_cpu and re.search(r"^host ", printed, re.MULTILINE):
        found += gibibytes(printed, r"host +([\d.,]+) (MiB|GiB) per node") / settings.devices
    parameters = re.search(r"^parameters +([\d,]+)", printed, re.MULTILINE)
    return int(parameters[1].replace(",", "")) if parameters else None, round(found * 1024, 1)


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
