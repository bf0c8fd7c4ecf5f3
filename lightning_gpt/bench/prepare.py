"""How fast text becomes tokens: ``prepare.py``'s whole path beside tiktoken's own batch encoder."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gpt.bench.tax import machine_facts, require_positive, require_writable, spread, write_result
from lightning_gpt.config import UserError
from lightning_gpt.data.text.corpora import find_corpus
from lightning_gpt.data.tokens.encoding import UNIT_BYTES
from lightning_gpt.data.tokens.tokenizing import Plan, write_corpus
from lightning_gpt.tokenizers.tables import load_encoding

OURS, THEIRS = "prepare.py", "tiktoken"


@dataclass(frozen=True)
class PrepareSpeed:
    """Two paths over the same text, measured in turns on the same machine.

    Attributes:
        megabytes: Size of the text, in 10^6 bytes.
        workers: Threads that encode, the same for both.
        speeds: Speed of each round by path, in 10^6 bytes per second.
        machine: Hardware and versions.
    """

    megabytes: float
    workers: int
    speeds: dict[str, list[float]]
    machine: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """Our speed over tiktoken's in each round: what both share, such as a busy machine, cancels out."""
        return [ours / theirs for ours, theirs in zip(self.speeds[OURS], self.speeds[THEIRS], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, and its medians, in plain types."""
        measured = self.speeds | {"ratio": self.ratios}
        return {
            "benchmark": "prepare",
            "megabytes": self.megabytes,
            "workers": self.workers,
            "machine": self.machine,
        } | {name: spread(values) | {"rounds": values} for name, values in measured.items()}

    def table(self) -> str:
        """The same for people."""
        rows = [f"{'path':12}{'median MB/s':>14}{'min':>10}{'max':>10}"]
        for name, values in (self.speeds | {"ratio": self.ratios}).items():
            rows.append(f"{name:12}{statistics.median(values):14.3f}{min(values):10.3f}{max(values):10.3f}")
        m = self.machine
        rows.append(
            f"{len(self.ratios)} rounds in turns over {self.megabytes:.1f} MB, {self.workers} threads; {m['hardware']},"
            f" {m['cores']} cores\ntiktoken {m['tiktoken']}, python {m['python']}"
        )
        return "\n".join(rows)


def measure_prepare(
    *,
    rounds: int = 5,
    megabytes: int = 32,
    workers: int | None = None,
    data: str | None = None,
    json: str | None = None,
) -> PrepareSpeed:
    """Times ``prepare.py`` from a text file to GPT-2 token files, and ``encode_ordinary_batch`` on the same text.

    Ours reads the file, twice, and writes the tokens to the disk; tiktoken's gets the text in memory, cut into pieces
    as long as ours, and makes lists of tokens.

    Args:
        rounds: How often each path is measured.
        megabytes: Length of the text, in 10^6 bytes.
        workers: Threads that encode; None for one per core.
        data: A text file, repeated up to the length; None for words in lines.
        json: Where the result is written as JSON as well.

    Raises:
        UserError: Nothing to measure, GPT-2's tables cannot be had, or a file cannot be read or written.
    """
    require_positive(rounds=rounds, megabytes=megabytes, workers=workers)
    require_writable(json)
    import tiktoken

    encoding = load_encoding("gpt2")
    machine = machine_facts(torch.device("cpu"), torch.get_num_threads()) | {"tiktoken": tiktoken.__version__}
    workers = workers or machine["cores"]
    text = _text(data, megabytes * 1_000_000)
    pieces = [text[start : start + UNIT_BYTES] for start in range(0, len(text), UNIT_BYTES)]
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as temporary:
        file = Path(temporary, "text.txt")
        file.write_text(text, encoding="utf-8", newline="")
        corpus, plan = find_corpus([str(file)]), Plan("gpt2", workers=workers)
        size = file.stat().st_size / 1e6
        paths: list[tuple[str, Callable[[], object]]] = [
            (OURS, lambda: write_corpus(Path(temporary, "tokens"), corpus=corpus, plan=plan)),
            (THEIRS, lambda: encoding.encode_ordinary_batch(pieces, num_threads=workers)),
        ]
        speeds: dict[str, list[float]] = {name: [] for name, _ in paths}
        for number in range(rounds):
            for name, run in paths if number % 2 == 0 else reversed(paths):
                started = time.perf_counter()
                run()
                speeds[name].append(size / (time.perf_counter() - started))
    speed = PrepareSpeed(size, workers, speeds, machine)
    write_result(json, speed.to_dict())
    return speed


def _text(data: str | None, size: int) -> str:
    if data is None:
        draw = np.random.default_rng(0)
        words = ["".join(letters) for letters in _letters(draw, 5000)]
        lines = (" ".join(line) for line in np.array(words)[draw.zipf(1.3, (20_000, 12)) % len(words)])
        content = ("\n".join(lines) + "\n").encode()
    else:
        try:
            content = Path(data).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"--data {data}: {error.strerror}; give a text file") from error
    if not content:
        raise UserError(f"--data {data}: there is no text in it")
    try:
        whole = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {data} is not UTF-8 text (byte {error.start})") from None
    return whole * (size // len(content)) or whole


def _letters(draw: np.random.Generator, count: int) -> list[list[str]]:
    alphabet = list("etaoinshrdlucmfwypvbgkjqxz")
    weights = 1 / np.arange(2, len(alphabet) + 2)
    lengths = 1 + draw.poisson(4, count)
    return [list(draw.choice(alphabet, length, p=weights / weights.sum())) for length in lengths]
