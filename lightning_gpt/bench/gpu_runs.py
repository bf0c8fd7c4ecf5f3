"""Training runs and timings for the steps of ``bench.py gpu``."""

import contextlib
import io
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightning import Callback

from lightning_gpt.cli import parse_train
from lightning_gpt.config import UserError
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.strategies.devices import device_time
from lightning_gpt.training.run import train

_TEXT = "".join(f"{n} green bottles hanging on the wall, and if {n} should fall\n" for n in range(400))


def device_flags(device: torch.device) -> list[str]:
    """Return the flags for one device of a kind."""
    return [f"--accelerator={accelerator_of(device)}", "--devices=1"]


def accelerator_of(device: torch.device) -> str:
    """Return Lightning's name of a device."""
    return "gpu" if device.type == "cuda" else "cpu"


def write_text() -> Path:
    """Write a small text into the working directory."""
    Path("text.txt").write_text(_TEXT, encoding="ascii")
    return Path("text.txt")


def large_model(device: torch.device) -> list[str]:
    """Return the flags of the 124M size, or of a small one on a CPU, with random tokens."""
    vocab_size = 50304 if device.type == "cuda" else 101
    tokens = np.random.default_rng(0).integers(0, vocab_size, 300_000, dtype=np.uint16)
    train_tokens, val_tokens = np.split(tokens, [200_000])
    write_token_files(
        Path("tokens"), train=train_tokens, val=val_tokens, tokenizer=None, vocab_size=vocab_size, source="random"
    )
    sizes = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024", "--batch_size=16"]
    if device.type == "cpu":
        sizes = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--batch_size=2"]
    return [*sizes, "--data=tokens", "--trainer.enable_progress_bar=false"]


def printed_by_training(flags: list[str], *, callback: Callback | None = None) -> str:
    """Train, and return what was printed to stdout.

    Raises:
        UserError: The run was refused.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(parse_train(flags), callbacks=[callback] if callback else [])
    return printed.getvalue()


def gibibytes(printed: str, pattern: str) -> float:
    """Return the size that a pattern finds, with groups for number and unit; raise a UserError if it finds none."""
    found = re.search(pattern, printed)
    if found is None:
        raise UserError(f"nothing like {pattern!r} was printed")
    return float(found[1].replace(",", "")) / (1024 if found[2] == "MiB" else 1)


def planned_peak(printed: str) -> float:
    """Return the peak memory of a device in GiB that ``--dry_run`` has printed."""
    return gibibytes(printed, r"peak +([\d.,]+) (MiB|GiB) per device")


def median_seconds(function: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Return the median time of a call, after two calls to warm up."""
    times = []
    for number in range(repeats + 2):
        start = device_time(device)
        function()
        if number > 1:
            times.append(device_time(device) - start)
    return statistics.median(times)
