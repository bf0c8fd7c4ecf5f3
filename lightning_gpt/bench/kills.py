"""Kill training runs at random moments, resume them, and compare the result with an uninterrupted run."""

import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.bench.forked import ForkedRun, in_child
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.config import UserError

STEPS, SAVE_INTERVAL = 60, 5
FLAGS = (
    f"--implementation=nanogpt --n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=4 --max_steps={STEPS}"
    f" --dropout=0.1 --eval_interval={SAVE_INTERVAL} --eval_batches=2 --logger=none --accelerator=cpu --sample_tokens=0"
    " --trainer.enable_progress_bar=false --resume=auto"
).split()
RANKS = {"single": 1, "ddp": 2, "fsdp": 2, "deepspeed_stage_2": 2, "deepspeed_stage_3": 2}
_SAVE_SECONDS = (0.002, 0.01, 0.05, 0.25)  # a kill inside a save comes at most so long after its beginning


@dataclass
class Kills:
    """What one strategy's kills did.

    Attributes:
        strategy: Name of the strategy; "single" for one process.
        kills: Number of kills.
        in_save: Number of those that came while a checkpoint was being saved.
        unreadable: Number of kills after which there was no readable checkpoint although one had been saved, or after
            which the run could not continue.
        lost: Steps of work lost by each kill.
        runs: Number of runs that were finished.
        difference: Largest difference between a weight of a finished run and of the uninterrupted run.
    """

    strategy: str
    kills: int = 0
    in_save: int = 0
    unreadable: int = 0
    lost: list[int] | None = None
    runs: int = 0
    difference: float = 0.0

    def row(self) -> str:
        """Return one line of the table."""
        lost = self.lost or [0]
        return (
            f"{self.strategy:20}{self.kills:6}{self.in_save:9}{self.unreadable:12}{sum(lost) / len(lost):11.1f}"
            f"{max(lost):6}{self.runs:6}{self.difference:12.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return asdict(self)


HEADING = (
    f"{'kills':20}{'count':>6}{'in save':>9}{'unreadable':>12}{'lost, mean':>11}{'max':>6}{'runs':>6}{'weights':>12}"
)


def kill_runs(strategy: str, *, kills: int, data: Path, folder: Path, draw: random.Random) -> Kills:
    """Kill runs under a strategy until there were enough kills; half of them inside a save.

    All processes of a run are killed at once. After each kill the checkpoint is read completely, and the same command
    continues the run. Work is lost in steps: the step at the kill less the step of the checkpoint.

    Args:
        strategy: A key of ``RANKS``.
        kills: Number of kills.
        data: Training text.
        folder: Folder for the runs.
        draw: Source of the random moments.
    """
    ranks = RANKS[strategy]
    flags = [*FLAGS, f"--data={data}"]
    if ranks > 1:
        flags += [f"--strategy={strategy}", f"--devices={ranks}"]
    output = folder / f"{strategy}.txt"
    result = Kills(strategy, lost=[])
    reference = _finish(flags, ranks=ranks, run=folder / f"{strategy}-whole", output=output)
    assert reference is not None, output.read_text(encoding="utf-8", errors="replace")[-2000:]
    while result.kills < kills:
        run = folder / f"{strategy}-{result.runs}"
        saved = 0
        while result.kills < kills and saved < STEPS:
            forked = ForkedRun([*flags, f"--out_dir={run}"], ranks=ranks, output=output)
            reached = _kill_somewhere(forked, first=saved, in_save=result.kills % 2 == 1, draw=draw)
            if reached is None:
                result.unreadable += any(code != 0 for code in forked.join())
                break  # the run came to its end
            step, in_save = reached
            result.kills += 1
            result.in_save += in_save
            found = in_child(_read_all, run)
            if found is None:
                result.unreadable += step > SAVE_INTERVAL
                found = 0
            assert result.lost is not None
            result.lost.append(max(0, step - found))
            saved = found
        weights = _finish(flags, ranks=ranks, run=run, output=output)
        if weights is None:
            result.unreadable += 1
        else:
            result.runs += 1
            result.difference = max(result.difference, _largest_difference(weights, reference))
        shutil.rmtree(run, ignore_errors=True)
    return result


def _kill_somewhere(forked: ForkedRun, *, first: int, in_save: bool, draw: random.Random) -> tuple[int, bool] | None:
    """Kill a run at a random moment; return its step and whether it was saving, or None if it ended before."""
    goal = draw.randint(first, STEPS - 1)
    if not forked.wait_until(lambda: forked.step >= goal):
        return None
    if in_save:
        if not forked.wait_until(lambda: forked.saving):
            return None
        time.sleep(draw.random() * draw.choice(_SAVE_SECONDS))
    else:
        time.sleep(draw.random() * 0.05)
    if not forked.alive:
        return None
    forked.send(signal.SIGSTOP)  # the step and the phase are then those of the kill
    step, saving = forked.step, forked.saving
    forked.kill()
    return step, saving


def _finish(flags: list[str], *, ranks: int, run: Path, output: Path) -> dict[str, np.ndarray] | None:
    """Train to the end; return the weights, or None if that failed."""
    codes = ForkedRun([*flags, f"--out_dir={run}"], ranks=ranks, output=output).join()
    return in_child(_weights, run) if codes == [0] * ranks else None


def _read_all(run: Path) -> int | None:
    """Read the last checkpoint completely; return its step, or None if there is none or it is damaged."""
    try:
        checkpoint = open_checkpoint(find_checkpoint(str(run), which="last"))
        for name in checkpoint.stored:
            checkpoint.weight(name)
        for name, state in checkpoint.moments.items():
            for key in state:
                checkpoint.moment(f"{name}/{key}")
    except UserError:
        return None
    return checkpoint.step


def _weights(run: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(find_checkpoint(str(run), which="last"))
    assert checkpoint.step == STEPS
    return {name: checkpoint.weight(name).numpy() for name in checkpoint.stored}


def _largest_difference(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    assert some.keys() == others.keys()
    return max(float(abs(some[name] - others[name]).max()) for name in some)
