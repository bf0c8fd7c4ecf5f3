"""Train for many steps on a large corpus, and watch resident memory and open files."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from lightning_gpt.bench.forked import in_child, resident_bytes
from lightning_gpt.bench.timing import train_silently
from lightning_gpt.cli import parse_prepare, parse_train
from lightning_gpt.data.tokens.preparation import prepare_folder

_READINGS = 20
_FLAGS = (
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=64 --batch_size=12 --eval_batches=10 --logger=csv"
    " --accelerator=cpu --sample_tokens=0 --trainer.enable_progress_bar=false"
).split()


@dataclass(frozen=True)
class Endurance:
    """Memory and open files over a long run.

    Attributes:
        steps: Optimizer steps.
        corpus_bytes: Size of ``train.bin``.
        readings: Steps, resident bytes and open file descriptors, at regular intervals.
    """

    steps: int
    corpus_bytes: int
    readings: Sequence[tuple[int, int, int]]

    def row(self) -> str:
        """Return the lines of the table."""
        _, memory, files = zip(*self.readings, strict=True)
        settled = len(memory) // 10 + 1  # the first readings include caches that fill
        return (
            f"{self.steps:,} steps on {self.corpus_bytes / 2**30:.2f} GiB: resident {memory[settled] / 2**20:,.0f} MiB"
            f" after {self.readings[settled][0]:,} steps, {memory[-1] / 2**20:,.0f} at the end,"
            f" {max(memory) / 2**20:,.0f} at most; descriptors {files[settled]}, {files[-1]}, {max(files)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return asdict(self)


class _Watch(Callback):
    """Read memory and descriptors at regular intervals."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // _READINGS)
        self.readings: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Add a reading."""
        if trainer.global_step % self.every == 0:
            self.readings.append((trainer.global_step, resident_bytes(), len(os.listdir("/proc/self/fd"))))


def train_long(*, steps: int, corpus_bytes: int, data: Path, folder: Path) -> Endurance:
    """Train a tiny model on token files of a given size.

    Args:
        steps: Optimizer steps.
        corpus_bytes: Size of ``train.bin``, in bytes.
        data: Training text, repeated to that size.
        folder: Folder to work in.
    """
    tokens = folder / "tokens"
    in_child(_write_tokens, data, tokens, corpus_bytes)
    flags = [*_FLAGS, f"--data={tokens}", f"--out_dir={folder / 'run'}", f"--max_steps={steps}"]
    flags += [f"--eval_interval={max(1, steps // 10)}"]
    readings = in_child(_train, flags, steps, timeout=24 * 3600)
    return Endurance(steps, (tokens / "train.bin").stat().st_size, readings)


def _write_tokens(data: Path, folder: Path, size: int) -> None:
    text = folder.with_name("long.txt")
    content = data.read_bytes()
    block = content * (2**20 // len(content) + 1)  # characters become two bytes each
    with text.open("wb") as out:
        for _ in range(max(1, size // (2 * len(block)))):
            out.write(block)
    prepare_folder(parse_prepare([str(text), f"--out={folder}", "--tokenizer=char", "--val_fraction=0.001"]))
    text.unlink()


def _train(flags: list[str], steps: int) -> list[tuple[int, int, int]]:
    watch = _Watch(steps)
    train_silently(parse_train(flags), watch)
    return watch.readings
