"""``bench.py prepare``: speed of prepare.py, relative to tiktoken's batch encoder."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.report import machine_facts, require_positive, spread, write_result
from lightning_gpt.config import UserError
from lightning_gpt.data.text.corpora import find_corpus
from lightning_gpt.data.tokens.encoding import UNIT_BYTES
from lightning_gpt.data.tokens.tokenizing import Plan, write_corpus
from lightning_gpt.tokenizers.tables import load_encoding

PREPARE, TIKTOKEN = "prepare.py", "tiktoken"


@dataclass(frozen=True)
class PrepareSpeed:
    """Result of the benchmark.

    Attributes:
        megabytes: Size of the text, in 10^6 bytes.
        workers: Number of encoding threads of both paths.
        speeds: Speed of each path per round, in 10^6 bytes per second.
        machine: Hardware and versions.
    """

    megabytes: float
    workers: int
    speeds: dict[str, list[float]]
    machine: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """Speed of prepare.py divided by tiktoken's, per round, so that drift between rounds cancels."""
        return [ours / theirs for ours, theirs in zip(self.speeds[PREPARE], self.speeds[TIKTOKEN], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return settings, measurements and their spreads, ready for JSON."""
        measured = self.speeds | {"ratio": self.ratios}
        return {
            "benchmark": "prepare",
            "megabytes": self.megabytes,
            "workers": self.workers,
            "machine": self.machine,
        } | {name: spread(values) | {"rounds": values} for name, values in measured.items()}

    def table(self) -> str:
        """Return the result as text."""
        rows = [f"{'path':12}{'median MB/s':>14}{'min':>10}{'max':>10}"]
        for name, values in (self.speeds | {"ratio": self.ratios}).items():
            rows.append(f"{name:12}{statistics.median(values):14.3f}{min(values):10.3f}{max(values):10.3f}")
        m = self.machine
        rows.append(
            f"{len(self.ratios)} alternating rounds over {self.megabytes:.1f} MB, {self.workers} threads;"
            f" {m['hardware']}, {m['cores']} cores\ntiktoken {m['tiktoken']}, python {m['python']}"
        )
        return "\n".join(rows)


def measure_prepare(
    *, rounds: int, megabytes: int, workers: int | None, data: str | None, json: str | None
) -> PrepareSpeed:
    """Time prepare.py from text file to GPT-2 token files, and tiktoken's ``encode_ordinary_batch`` on the same text.

    prepare.py reads the file twice and writes the tokens to disk. tiktoken gets the text in memory, in pieces of the
    same length as ours, and returns lists of tokens.

    Args:
        rounds: Number of measurements of each path.
        megabytes: Length of the text, in 10^6 bytes.
        workers: Number of encoding threads; None for one per core.
        data: Text file, repeated up to ``megabytes``; None for random words.
        json: File for the result, or None.

    Raises:
        UserError: A count is below 1, a file cannot be read or written, or GPT-2's tables are not available.
    """
    require_positive(rounds=rounds, megabytes=megabytes, workers=workers)
    require_writable(json)
    text = _text(data, megabytes * 1_000_000)  # first, so that a wrong --data is reported even without GPT-2's tables
    encoding = load_encoding("gpt2")
    machine = machine_facts(torch.device("cpu"), torch.get_num_threads()) | {"tiktoken": version("tiktoken")}
    workers = workers or machine["cores"]
    pieces = [text[start : start + UNIT_BYTES] for start in range(0, len(text), UNIT_BYTES)]
    with tempfile.TemporaryDirectory(prefix="lightning-gpt-bench-") as temporary:
        file = Path(temporary, "text.txt")
        file.write_text(text, encoding="utf-8", newline="")
        corpus, plan = find_corpus([str(file)]), Plan("gpt2", workers=workers)
        size = file.stat().st_size / 1e6
        paths: list[tuple[str, Callable[[], object]]] = [
            (PREPARE, lambda: write_corpus(Path(temporary, "tokens"), corpus=corpus, plan=plan)),
            (TIKTOKEN, lambda: encoding.encode_ordinary_batch(pieces, num_threads=workers)),
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
    """Return a file's text, or random words if data is None, repeated up to size bytes."""
    if data is None:
        content = _random_words()
    else:
        try:
            content = Path(data).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"--data {data}: {error.strerror}; give a text file") from error
    if not content:
        raise UserError(f"--data {data}: the file is empty; give a text file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {data}: byte {error.start} is not UTF-8; give a text file") from None
    return text * (size // len(content)) or text


def _random_words() -> bytes:
    draw = np.random.default_rng(0)
    alphabet = list("etaoinshrdlucmfwypvbgkjqxz")
    weights = 1 / np.arange(2, len(alphabet) + 2)
    lengths = 1 + draw.poisson(4, 5000)
    words = np.array(["".join(draw.choice(alphabet, length, p=weights / weights.sum())) for length in lengths])
    lines = words[draw.zipf(1.3, (20_000, 12)) % len(words)]
    return ("\n".join(" ".join(line) for line in lines) + "\n").encode()
