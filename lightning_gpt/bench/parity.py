"""Whether every strategy trains the same model: the same losses and weights as a single process, step for step."""

import csv
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch

from lightning_gpt.bench.tax import machine_facts, require_writable, write_result
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.cli import parse_train
from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, flag_options
from lightning_gpt.optim.registry import OPTIMIZERS
from lightning_gpt.strategies import STRATEGIES, find_devices, get_strategy
from lightning_gpt.training.run import train

# Samples of an optimizer step, however they are divided into ranks and micro-batches.
GLOBAL_BATCH = 8
# Sizes that no number of ranks divides evenly, so that the padding of shards is put to the test.
_RUN = (
    "--n_layer=2 --n_head=3 --n_embd=33 --block_size=15 --eval_batches=4 --logger=csv --log_every_n_steps=1"
    " --sample_tokens=0 --warmup_steps=2"
)
# Rotary positions want heads of an even size; here tables divide by no number of ranks, and heads share keys.
_OWN = {"moderngpt": ["--n_embd=42", "--n_kv_head=1", "--window=9", "--bigram=501", "--smear=true"]}


@dataclass(frozen=True)
class Case:
    """One way of taking an optimizer step."""

    implementation: str
    accumulate: int
    clip: float
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Deviation:
    """How far a strategy is from a single process.

    Attributes:
        strategy: The strategy.
        case: What was trained.
        losses: The training loss of each step.
        loss: Largest relative difference of one of them.
        norm: Largest relative difference of a step's gradient norm, which the optimizer hides from the losses; 0 where
            nothing is clipped, since nothing is measured then.
        weights: Largest absolute difference of a final weight.
    """

    strategy: str
    case: Case
    losses: tuple[float, ...]
    loss: float
    norm: float
    weights: float


def cases(strategy: str, *, implementations: Sequence[str] = tuple(IMPLEMENTATIONS)) -> list[Case]:
    """Every implementation, with and without accumulation and clipping, and with each further optimizer.

    Args:
        strategy: A row of the registry; optimizers that do not work under it are left out.
        implementations: Names of the registry.
    """
    with_adamw = [Case(*case) for case in itertools.product(implementations, (1, 2), (0.0, 0.5))]
    fit = [o.name for o in OPTIMIZERS.values() if o.build_deepspeed or not STRATEGIES[strategy].deepspeed_engine]
    others = [name for name in fit if name != Case.optimizer]
    return with_adamw + [Case(*case) for case in itertools.product(implementations, (2,), (0.5,), others)]


def deviations(
    strategy: str, *, folder: Path, which: Sequence[Case], devices: int, accelerator: str, steps: int, data: str
) -> list[Deviation]:
    """Trains the cases in a single process, and under a strategy, and compares.

    Args:
        strategy: A row of the registry.
        folder: Where the runs are kept; what a single process trained there for another strategy serves again.
        which: The cases.
        devices: Its number of ranks.
        accelerator: "cpu" or "gpu".
        steps: Optimizer steps.
        data: What is trained on.

    Raises:
        UserError: A run under the strategy failed; the message is its first error.
    """
    shared = [*_RUN.split(), f"--max_steps={steps}", f"--eval_interval={steps}", f"--data={data}"]
    shared += [f"--accelerator={accelerator}"]
    runs: dict[str, list[Path]] = {}
    for name, ranks in (("auto", 1), (strategy, devices)):
        runs[name] = [folder / f"{name}-{'-'.join(map(str, astuple(case)))}" for case in which]
        missing = [(case, run) for case, run in zip(which, runs[name], strict=True) if not run.exists()]
        place = [f"--strategy={name}"]
        plans = [[*shared, *_flags(case, ranks), *place, f"--out_dir={run}"] for case, run in missing]
        if plans:
            _launch(plans, ranks)
    return [_compare(strategy, case, *pair) for case, *pair in zip(which, *runs.values(), strict=True)]


def _compare(strategy: str, case: Case, alone: Path, spread: Path) -> Deviation:
    losses = [_column(run, "train_loss") for run in (alone, spread)]
    # DeepSpeed measures the norm always, the others only to clip by it.
    norms = [_column(run, "grad_norm") if case.clip else [] for run in (alone, spread)]
    assert losses[0] and len(norms[0]) == (len(losses[0]) if case.clip else 0)
    return Deviation(
        strategy,
        case,
        losses=tuple(losses[1]),
        loss=_apart(*losses),
        norm=_apart(*norms),
        weights=_weight_difference(alone, spread),
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
        *_OWN.get(case.implementation, []),
    ]


def _launch(runs: list[list[str]], ranks: int) -> None:
    """Runs command lines of train.py, one after another, in one group of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "lightning_gpt.bench.parity", dumps(runs)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raised = [line for line in done.stderr.splitlines() if "Error: " in line or line.startswith("error: ")]
        raise UserError(f"a run failed: {(raised or done.stderr.splitlines() or ['no message'])[0]}")


def _column(run: Path, name: str) -> list[float]:
    [log] = run.glob("logs/*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _apart(alone: list[float], spread: list[float]) -> float:
    return max((abs(b / a - 1) for a, b in zip(alone, spread, strict=True)), default=0.0)


def _weight_difference(a: Path, b: Path) -> float:
    ours, theirs = (open_checkpoint(run / "checkpoints" / "last.ckpt") for run in (a, b))
    assert ours.names() == theirs.names()
    return max((ours.weight(name) - theirs.weight(name)).abs().max().item() for name in ours.names())


@dataclass(frozen=True)
class Parity:
    """What was found under each strategy.

    Attributes:
        found: All cases of all strategies.
        steps: Optimizer steps of each run.
        devices: Ranks of each strategy.
        machine: Hardware and versions.
    """

    found: list[Deviation]
    steps: int
    devices: int
    machine: dict[str, Any]

    def table(self) -> str:
        """A line for each strategy and optimizer: the worst of its cases."""
        lines = [f"{'strategy':28}{'loss, relative':>16}{'norm, relative':>16}{'weight, absolute':>18}{'runs':>6}"]
        by_row: dict[str, list[Deviation]] = {}
        for d in self.found:
            own = "" if d.case.optimizer == Case.optimizer else f", {d.case.optimizer}"
            by_row.setdefault(d.strategy + own, []).append(d)
        for name, mine in by_row.items():
            loss, norm, weights = (max(getattr(d, part) for d in mine) for part in ("loss", "norm", "weights"))
            lines.append(f"{name:28}{loss:16.1e}{norm:16.1e}{weights:18.1e}{len(mine):6}")
        lines.append(f"worst of so many runs of {self.steps} steps each, {self.devices} ranks against one process")
        return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in self.machine.items())])


def measure_parity(
    *, steps: int, devices: int | None, accelerator: str, data: str, strategies: str | None, json: str | None
) -> Parity:
    """Trains every case under every strategy and in a single process.

    Args:
        steps: Optimizer steps of each run.
        devices: Ranks; by default all GPUs, or 2 on a CPU.
        accelerator: "auto", "cpu" or "gpu".
        data: What is trained on.
        strategies: Names, separated by commas; by default all.
        json: Where the result is written as JSON as well.

    Raises:
        UserError: A strategy is unknown, or one of its runs failed.
    """
    require_writable(json)
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    devices = devices or (torch.cuda.device_count() if accelerator == "gpu" else 2)
    if GLOBAL_BATCH % (2 * devices):
        raise UserError(f"--devices {devices} does not divide the {GLOBAL_BATCH // 2} samples of a micro-batch")
    names = strategies.split(",") if strategies else [name for name in STRATEGIES if name != "auto"]
    found = []
    settings = {"devices": devices, "accelerator": accelerator, "steps": steps, "data": data}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            options = TrainerOptions(strategy=name, accelerator=accelerator, devices=devices)
            get_strategy(options, where=find_devices(options))
            print(f"training under {name}", file=sys.stderr, flush=True)
            found += deviations(name, folder=Path(folder), which=cases(name), **settings)
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    parity = Parity(found, steps, devices, machine_facts(device, torch.get_num_threads()))
    write_result(json, asdict(parity))
    return parity


if __name__ == "__main__":
    for flags in loads(sys.argv[1]):
        train(parse_train(flags))
