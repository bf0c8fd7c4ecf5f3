"""What evaluations found: lines for one checkpoint, a table for several, and JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gpt.config import UserError


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        checkpoint: What was scored.
        hash: A sha256 of its weights, the same in every form of a checkpoint.
        step: Optimizer steps it was trained for.
        loss: Mean cross-entropy, nats per token.
        perplexity: exp(loss); infinite, and null in JSON, where that is beyond a float.
        bits_per_byte: Cross-entropy in bits over the text's UTF-8 bytes; None where the bytes are not known.
        tokens: Tokens scored.
        data: The text that they are of.
        block_size: The context, in tokens.
        stride: Tokens from one window to the next.
        accuracy: The share of answers that greedy generation gets right as a whole; None where the data is no task.
    """

    checkpoint: str
    hash: str
    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    data: str
    block_size: int
    stride: int
    accuracy: float | None = None

    def found(self) -> dict[str, Any]:
        """The numbers by name, without those that the data has no use for."""
        return {k: v for k, v in asdict(self).items() if k != "accuracy" or v is not None}

    lines = found

    def rows(self) -> list[dict[str, Any]]:
        """Its row of a table."""
        names = ("step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "block_size", "stride")
        return [{name: getattr(self, name) for name in names}]


@dataclass(frozen=True)
class HarnessScore:
    """What EleutherAI's lm-eval found.

    Attributes:
        checkpoint: What was scored.
        hash: A sha256 of its weights, the same in every form of a checkpoint.
        step: Optimizer steps it was trained for.
        block_size: The context, in tokens.
        lm_eval: The version of lm-eval.
        tasks: By task, the numbers by lm-eval's names of metric and filter.
    """

    checkpoint: str
    hash: str
    step: int
    block_size: int
    lm_eval: str
    tasks: dict[str, dict[str, float]]

    def found(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)

    def lines(self) -> dict[str, Any]:
        """The numbers by name and without levels."""
        flat = {f"{row['task']} {row['metric']}": row["value"] for row in self.rows()}
        return {k: v for k, v in self.found().items() if k != "tasks"} | flat

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of a table, one for each number."""
        return [
            {"step": self.step, "task": task, "metric": metric, "value": value}
            for task, numbers in self.tasks.items()
            for metric, value in numbers.items()
        ]


@dataclass(frozen=True)
class Report:
    """What the evaluation of one or several checkpoints found.

    Attributes:
        scores: One for each checkpoint.
        notes: What forbids to compare some of the numbers, a sentence each.
    """

    scores: Sequence[Score] | Sequence[HarnessScore]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """A line per number of one checkpoint, or a row per checkpoint and below them the notes."""
        if len(self.scores) == 1:
            lines = self.scores[0].lines()
            width = max(13, *map(len, lines)) + 1
            return "\n".join(f"{name:{width}}{_shown(value)}" for name, value in lines.items())
        rows = [
            {"checkpoint": name} | row
            for name, score in zip(_short([s.checkpoint for s in self.scores]), self.scores, strict=True)
            for row in score.rows()
        ]
        columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        cells = [columns, *([_shown(row[name]) for name in columns] for row in rows)]
        sides = ["<" if isinstance(rows[0][name], str) else ">" for name in columns]
        shapes = [
            f"{side}{max(map(len, column))}" for side, column in zip(sides, zip(*cells, strict=True), strict=True)
        ]
        lines = ["  ".join(map(format, line, shapes)) for line in cells]
        return "\n".join([*(line.rstrip() for line in lines), *(f"note: {note}" for note in self.notes)])

    def save(self, file: Path) -> None:
        """Writes JSON: an object, or a list of them for several checkpoints.

        Raises:
            UserError: The file cannot be written; the message holds what it was to say.
        """
        known = [_finite(score.found()) for score in self.scores]
        text = json.dumps(known[0] if len(known) == 1 else known, indent=2)
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # a full disk, say: the numbers are told all the same
            raise UserError(f"--json {file} cannot be written: {error.strerror}; it was to say {text}") from error


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "None" if value is None else str(value)


def _short(paths: list[str]) -> list[str]:
    """Paths without what they begin with alike."""
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def _finite(value: Any) -> Any:
    """The value with None for what JSON has no word for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
