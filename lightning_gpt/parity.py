"""Whether every strategy trains the same model: the same losses and weights as a single process, step for step."""

import csv
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.cli import parse_train
from lightning_gpt.config import UserError
from lightning_gpt.implementations import IMPLEMENTATIONS, flag_options
from lightning_gpt.strategies import STRATEGIES
from lightning_gpt.training import train

# Samples of an optimizer step, however they are divided into ranks and micro-batches.
GLOBAL_BATCH = 8
# Sizes that no number of ranks divides evenly, so that the padding of shards is put to the test.
_RUN = (
    "--n_layer=2 --n_head=3 --n_embd=33 --block_size=15 --eval_batches=4 --logger=csv --log_every_n_steps=1"
    " --sample_tokens=0 --warmup_steps=2"
)


@dataclass(frozen=True)
class Case:
    """One way of taking an optimizer step."""

    implementation: str
    accumulate: int
    clip: float


@dataclass(frozen=True)
class Deviation:
    """How far a strategy is from a single process.

    Attributes:
        strategy: The strategy.
        case: What was trained.
        loss: Largest relative difference of a step's training loss.
        weights: Largest absolute difference of a final weight.
    """

    strategy: str
    case: Case
    loss: float
    weights: float


def cases(implementations: Sequence[str] = tuple(IMPLEMENTATIONS)) -> list[Case]:
    """Every implementation, with and without accumulation and clipping."""
    return [Case(*case) for case in itertools.product(implementations, (1, 2), (0.0, 0.5))]


def deviations(
    strategy: str, *, which: Sequence[Case], devices: int, accelerator: str, steps: int, data: str
) -> Iterator[Deviation]:
    """Trains the cases in a single process, and under a strategy, and compares.

    Args:
        strategy: A row of the registry.
        which: The cases.
        devices: Its number of ranks.
        accelerator: "cpu" or "gpu".
        steps: Optimizer steps.
        data: What is trained on.

    Raises:
        UserError: A run under the strategy failed; the message ends with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        shared = [*_RUN.split(), f"--max_steps={steps}", f"--eval_interval={steps}", f"--data={data}"]
        shared += [f"--accelerator={accelerator}"]
        plans: dict[str, list[list[str]]] = {"auto": [], strategy: []}
        for name, ranks in (("auto", 1), (strategy, devices)):
            for number, case in enumerate(which):
                plans[name].append([*shared, *_flags(case, ranks), f"--out_dir={folder}/{name}-{number}"])
                plans[name][-1] += [f"--strategy={name}"]
        for name, ranks in (("auto", 1), (strategy, devices)):
            _launch(plans[name], ranks)
        for number, case in enumerate(which):
            alone, spread = (Path(folder) / f"{name}-{number}" for name in ("auto", strategy))
            pairs = list(zip(_losses(alone), _losses(spread), strict=True))
            assert len(pairs) == steps
            loss = max(abs(a - b) / abs(a) for a, b in pairs)
            yield Deviation(strategy, case, loss, _weight_difference(alone, spread))


def _flags(case: Case, ranks: int) -> list[str]:
    dropout = [
        o.name for o in flag_options(IMPLEMENTATIONS[case.implementation]) if o.name.endswith(("drop", "dropout"))
    ]
    return [
        f"--implementation={case.implementation}",
        f"--batch_size={GLOBAL_BATCH // ranks // case.accumulate}",
        f"--accumulate_grad_batches={case.accumulate}",
        f"--gradient_clip_val={case.clip}",
        *(f"--{name}=0" for name in dropout),
    ]


def _launch(runs: list[list[str]], ranks: int) -> None:
    """Runs command lines of train.py, one after another, in one group of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "lightning_gpt.parity", json.dumps(runs)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raised = [line for line in done.stderr.splitlines() if "Error: " in line or line.startswith("error: ")]
        raise UserError(f"a run failed: {(raised or done.stderr.splitlines() or ['no message'])[0]}")


def _losses(run: Path) -> list[float]:
    [log] = run.glob("logs/*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]


def _weight_difference(a: Path, b: Path) -> float:
    ours, theirs = (open_checkpoint(run / "checkpoints" / "last.ckpt") for run in (a, b))
    assert ours.names() == theirs.names()
    return max((ours.weight(name) - theirs.weight(name)).abs().max().item() for name in ours.names())


def measure_parity(*, steps: int, devices: int | None, accelerator: str, data: str, strategies: str | None) -> str:
    """The table of all strategies: the worst of each strategy's cases.

    Args:
        steps: Optimizer steps of each run.
        devices: Ranks; by default all GPUs, or 2 on a CPU.
        accelerator: "auto", "cpu" or "gpu".
        data: What is trained on.
        strategies: Names, separated by commas; by default all.

    Raises:
        UserError: A strategy is unknown, or one of its runs failed.
    """
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    devices = devices or (torch.cuda.device_count() if accelerator == "gpu" else 2)
    names = strategies.split(",") if strategies else [name for name in STRATEGIES if name != "auto"]
    lines = [f"{'strategy':28}{'loss, relative':>18}{'weights, absolute':>20}   ({devices} ranks, {accelerator})"]
    for name in names:
        found = list(deviations(name, which=cases(), devices=devices, accelerator=accelerator, steps=steps, data=data))
        loss, weights = max(d.loss for d in found), max(d.weights for d in found)
        lines.append(f"{name:28}{loss:18.1e}{weights:20.1e}")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    for flags in json.loads(sys.argv[1]):
        train(parse_train(flags))
