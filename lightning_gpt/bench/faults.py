"""Signals and full disks: what a run does, and what it leaves behind."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gpt.bench.forked import ForkedRun, in_child
from lightning_gpt.bench.kills import FLAGS, RANKS
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.cli import parse_train, reporting_errors
from lightning_gpt.config import UserError
from lightning_gpt.training.run import train

_SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75, "SIGUSR2": 75}
_STOP_STEP = 7  # between two saves, so that a checkpoint of this step was saved because of the signal
# Run a command on a small disk at $0 that is filled once there is a checkpoint, until a save fails and training goes on
# by the output in $2; copy the run to $1.
_SMALL_DISK = """
mount -t tmpfs -o size=8M none "$0" || exit 99
copy=$1; output=$2; shift 2
(
  until [ -e "$0/run/checkpoints/last.ckpt" ]; do sleep 0.01; done
  cat /dev/zero > "$0/filler"
  until grep -q "training goes on" "$output"; do sleep 0.01; done
  rm "$0/filler"
) 2> /dev/null &
"$@"
code=$?
kill $! 2> /dev/null
rm -f "$0/filler"
cp -r "$0/run" "$copy"
exit $code
"""


@dataclass(frozen=True)
class Fault:
    """What one fault did.

    Attributes:
        fault: The fault.
        expected: Exit code that the manual promises.
        code: Exit code of every rank.
        step: Step of the checkpoint that is left; None if there is none or it is damaged.
        message: Last line that the run printed.
    """

    fault: str
    expected: int
    code: list[int | None]
    step: int | None
    message: str

    @property
    def passed(self) -> bool:
        """Whether all ranks exited as promised and left a checkpoint."""
        return set(self.code) == {self.expected} and self.step is not None

    def row(self) -> str:
        """Return one line of the table."""
        codes = ",".join(str(code) for code in self.code)
        return f"{self.fault:28}{codes:>10}{str(self.step):>8}  {'ok' if self.passed else 'FAILED':8}{self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return asdict(self) | {"passed": self.passed}


HEADING = f"{'faults':28}{'exit':>10}{'step':>8}"


def send_signals(*, data: Path, folder: Path, strategies: list[str]) -> list[Fault]:
    """Send each stopping signal to a run of each strategy; under ranks, to one rank alone.

    Args:
        data: Training text.
        folder: Folder to work in.
        strategies: Keys of ``RANKS``.
    """
    results = []
    for strategy in strategies:
        ranks = RANKS[strategy]
        parallel = [f"--strategy={strategy}", f"--devices={ranks}"] if ranks > 1 else []
        for name, expected in _SIGNALS.items():
            run = folder / f"{strategy}-{name}"
            output = folder / f"{strategy}-{name}.txt"
            flags = [*FLAGS, *parallel, f"--data={data}", f"--out_dir={run}", "--max_steps=100000"]
            forked = ForkedRun([*flags, "--eval_interval=50000"], ranks=ranks, output=output)
            forked.wait_until(lambda forked=forked: forked.step >= _STOP_STEP)  # type: ignore[misc]
            forked.send(getattr(signal, name), rank=ranks - 1)
            codes = forked.join(timeout=120)
            results.append(Fault(f"{name}, {strategy}", expected, codes, *_left(run, output)))
            shutil.rmtree(run, ignore_errors=True)
    return results


def fill_disk(*, data: Path, folder: Path) -> list[Fault]:
    """Train on a small disk that is full for a while after the first save, with each value of ``--on_save_error``.

    The disk is a tmpfs in a mount namespace of the run's own; where that is not permitted, nothing is measured.

    Args:
        data: Training text.
        folder: Folder to work in.
    """
    results = []
    for choice, expected in (("stop", 2), ("continue", 0)):
        disk, copy, output = folder / f"disk-{choice}", folder / f"left-{choice}", folder / f"disk-{choice}.txt"
        disk.mkdir()
        flags = [*FLAGS, f"--data={data}", f"--out_dir={disk / 'run'}", f"--on_save_error={choice}"]
        program = "from lightning_gpt.bench.faults import train_main; train_main()"
        script = ["unshare", "-rm", "sh", "-c", _SMALL_DISK, str(disk), str(copy), str(output)]
        command = [*script, sys.executable, "-c", program, *flags]
        with output.open("wb") as out:
            try:
                code = subprocess.run(command, stdout=out, stderr=out).returncode
            except FileNotFoundError:
                return []
        if code == 99:
            return []
        results.append(Fault(f"disk full, {choice}", expected, [code], *_left(copy, output)))
    return results


@reporting_errors
def train_main(argv: Sequence[str] | None = None) -> None:
    """Do what train.py does, which is not in the path of an installed package."""
    train(parse_train(argv))


def _left(run: Path, output: Path) -> tuple[int | None, str]:
    """Return the step of the run's last checkpoint, and the last line that the run printed."""
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return in_child(_last_step, run), line


def _last_step(run: Path) -> int | None:
    try:
        return open_checkpoint(find_checkpoint(str(run), which="last")).step
    except UserError:
        return None
