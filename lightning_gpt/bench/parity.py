"""``bench.py parity``: losses and weights of every strategy against a single process."""

import csv
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.report import machine_facts, write_result
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.cli import parse_train
from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, flag_options
from lightning_gpt.optim.registry import OPTIMIZERS
from lightning_gpt.strategies import STRATEGIES, find_devices, get_strategy
from lightning_gpt.training.run import train

# Samples per optimizer step, over all ranks and micro-batches.
GLOBAL_BATCH = 8
# Sizes that the number of ranks does not divide, so that shards need padding.
_RUN = (
    "--n_layer=2 --n_head=3 --n_embd=33 --block_size=15 --eval_batches=4 --logger=csv --log_every_n_steps=1"
    " --sample_tokens=0 --warmup_steps=2"
)
# moderngpt needs an even head size, and has further options to cover. Two ranks do not divide 501 rows either.
_MODEL_FLAGS = {"moderngpt": ["--n_embd=42", "--n_kv_head=1", "--window=9", "--bigram=501", "--smear=true"]}


@dataclass(frozen=True)
class Case:
    """One combination of settings to train with.

    Attributes:
        implementation: Name of the model.
        accumulate: Micro-batches per optimizer step.
        clip: Gradient norm limit; 0 turns clipping off.
        optimizer: Name of the optimizer.
    """

    implementation: str
    accumulate: int
    clip: float
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Deviation:
    """Differences between a strategy and a single process in one case.

    Attributes:
        strategy: Name of the strategy.
        case: The case.
        losses: Training loss of each step under the strategy, nats per token.
        loss: Largest relative difference of a loss.
        norm: Largest relative difference of a gradient norm; AdamW's losses hardly depend on it. 0 without clipping,
            because the norm is not logged then.
        weights: Largest absolute difference of a final weight.
    """

    strategy: str
    case: Case
    losses: tuple[float, ...]
    loss: float
    norm: float
    weights: float


def cases(strategy: str, *, implementations: Sequence[str] = tuple(IMPLEMENTATIONS)) -> list[Case]:
    """Return the cases to compare under a strategy.

    Every model is trained with AdamW, with and without accumulation and clipping, and with every other supported
    optimizer.

    Args:
        strategy: Name of the strategy.
        implementations: Names of the models.
    """
    with_adamw = [Case(*case) for case in itertools.product(implementations, (1, 2), (0.0, 0.5))]
    fit = [o.name for o in OPTIMIZERS.values() if o.build_deepspeed or not STRATEGIES[strategy].deepspeed_engine]
    others = [name for name in fit if name != Case.optimizer]
    return with_adamw + [Case(*case) for case in itertools.product(implementations, (2,), (0.5,), others)]


def deviations(
    strategy: str, *, folder: Path, which: Sequence[Case], devices: int, accelerator: str, steps: int, data: str
) -> list[Deviation]:
    """Train cases under a strategy and in a single process, and compare them.

    Args:
        strategy: Name of the strategy.
        folder: Folder for the runs. Runs that it already contains are reused.
        which: The cases.
        devices: Number of ranks.
        accelerator: "cpu" or "gpu".
        steps: Optimizer steps of each run.
        data: Text or token files to train on, as for train.py.

    Raises:
        UserError: A run failed; the message contains its first error.
    """
    shared = [*_RUN.split(), f"--max_steps={steps}", f"--eval_interval={steps}", f"--data={data}"]
    shared += [f"--accelerator={accelerator}"]
    runs: dict[str, list[Path]] = {}
    for name, ranks in (("auto", 1), (strategy, devices)):
        runs[name] = [folder / f"{name}-{'-'.join(map(str, astuple(case)))}" for case in which]
        missing = [(case, run) for case, run in zip(which, runs[name], strict=True) if not run.exists()]
        commands = [[*shared, *_flags(case, ranks), f"--strategy={name}", f"--out_dir={run}"] for case, run in missing]
        if commands:
            _launch(commands, ranks)
    return [_compare(strategy, case, *pair) for case, *pair in zip(which, *runs.values(), strict=True)]


def _compare(strategy: str, case: Case, reference: Path, run: Path) -> Deviation:
    losses = [_column(folder, "train_loss") for folder in (reference, run)]
    # Only DeepSpeed logs the norm without clipping.
    norms = [_column(folder, "grad_norm") if case.clip else [] for folder in (reference, run)]
    assert losses[0] and len(norms[0]) == (len(losses[0]) if case.clip else 0)
    return Deviation(
        strategy,
        case,
        losses=tuple(losses[1]),
        loss=_relative_difference(*losses),
        norm=_relative_difference(*norms),
        weights=_weight_difference(reference, run),
    )


def _flags(case: Case, ranks: int) -> list[str]:
    dropout = [
        o.name for o in flag_options(IMPLEMENTATIONS[case.implementation]) if o.name.endswith(("drop", "dropout"))
    ]
    return [
        f"--implementation={case.implementation}",
        f"--batch_size={GLOBAL_BATCH // ranks // case.accumulate}",
        f"--accumulate_grad_batches={case.accumulate}",
        f"--gradient_clip_val={case.clip}",
        f"--optimizer={case.optimizer}",
        *(f"--{name}=0" for name in dropout),
        *_MODEL_FLAGS.get(case.implementation, []),
    ]


def _launch(commands: list[list[str]], ranks: int) -> None:
    """Run several command lines of train.py, one after another, in the same processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "lightning_gpt.bench.parity", dumps(commands)]
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search_path}, capture_output=True, text=True)
    if done.returncode:
        raised = [line for line in done.stderr.splitlines() if "Error: " in line or line.startswith("error: ")]
        raise UserError(f"a run failed: {(raised or done.stderr.splitlines() or ['no message'])[0]}")


def _column(run: Path, name: str) -> list[float]:
    [log] = run.glob("logs/*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _relative_difference(reference: list[float], values: list[float]) -> float:
    return max((abs(b / a - 1) for a, b in zip(reference, values, strict=True)), default=0.0)


def _weight_difference(reference: Path, run: Path) -> float:
    a, b = (open_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (reference, run))
    assert a.names() == b.names()
    return max((a.weight(name) - b.weight(name)).abs().max().item() for name in a.names())


@dataclass(frozen=True)
class Parity:
    """Result of the benchmark.

    Attributes:
        found: Deviations of all cases of all strategies.
        steps: Optimizer steps of each run.
        devices: Number of ranks.
        machine: Hardware and versions.
    """

    found: list[Deviation]
    steps: int
    devices: int
    machine: dict[str, Any]

    def table(self) -> str:
        """Return the largest differences of each strategy and optimizer as text."""
        lines = [f"{'strategy':28}{'loss, relative':>16}{'norm, relative':>16}{'weight, absolute':>18}{'runs':>6}"]
        by_row: dict[str, list[Deviation]] = {}
        for d in self.found:
            optimizer = "" if d.case.optimizer == Case.optimizer else f", {d.case.optimizer}"
            by_row.setdefault(d.strategy + optimizer, []).append(d)
        for name, found in by_row.items():
            loss, norm, weights = (max(getattr(d, part) for d in found) for part in ("loss", "norm", "weights"))
            lines.append(f"{name:28}{loss:16.1e}{norm:16.1e}{weights:18.1e}{len(found):6}")
        lines.append(f"largest differences over the runs, {self.steps} steps each; {self.devices} ranks, one process")
        return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in self.machine.items())])


def measure_parity(
    *, steps: int, devices: int | None, accelerator: str, data: str, strategies: str | None, json: str | None
) -> Parity:
    """Train every case under every strategy and in a single process, and compare them.

    Args:
        steps: Optimizer steps of each run.
        devices: Number of ranks; None for all GPUs, or 2 on a CPU.
        accelerator: "auto", "cpu" or "gpu".
        data: Text or token files to train on, as for train.py.
        strategies: Names, separated by commas; None for all.
        json: File for the result, or None.

    Raises:
        UserError: An option is wrong, or a run failed.
    """
    require_writable(json)
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    devices = devices or (torch.cuda.device_count() if accelerator == "gpu" else 2)
    if GLOBAL_BATCH % (2 * devices):
        choices = [str(n) for n in range(1, GLOBAL_BATCH // 2 + 1) if GLOBAL_BATCH // 2 % n == 0]
        raise UserError(
            f"--devices {devices}: {GLOBAL_BATCH // 2} samples are not divisible by it; give {', '.join(choices)}"
        )
    names = strategies.split(",") if strategies else [name for name in STRATEGIES if name != "auto"]
    found: list[Deviation] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            options = TrainerOptions(strategy=name, accelerator=accelerator, devices=devices)
            get_strategy(options, where=find_devices(options))
            print(f"training under {name}", file=sys.stderr, flush=True)
            found += deviations(
                name,
                folder=Path(folder),
                which=cases(name),
                devices=devices,
                accelerator=accelerator,
                steps=steps,
                data=data,
            )
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    parity = Parity(found, steps, devices, machine_facts(device, torch.get_num_threads()))
    write_result(json, asdict(parity))
    return parity


if __name__ == "__main__":
    for flags in loads(sys.argv[1]):
        train(parse_train(flags))
