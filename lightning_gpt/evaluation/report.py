"""Results of evaluations: lines for one checkpoint, a table for several, and JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gpt.atomic import atomic_file
from lightning_gpt.config import UserError


@dataclass(frozen=True)
class Score:
    """The score of a checkpoint on the validation split.

    Attributes:
        checkpoint: Path of the checkpoint.
        hash: A sha256 of its weights, the same for all forms of the checkpoint.
        step: Optimizer steps trained.
        loss: Mean cross entropy in nats per token.
        perplexity: exp(loss); infinite (null in JSON) if it overflows a float.
        bits_per_byte: Cross entropy in bits divided by the text's UTF-8 bytes; None if the bytes are unknown.
        tokens: Number of tokens scored.
        data: Name of the data.
        block_size: Context length in tokens.
        stride: Tokens from one window to the next.
        accuracy: Share of answers that match exactly under greedy decoding; None unless the data is a task.
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

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name; accuracy is included only for a task."""
        return {k: v for k, v in asdict(self).items() if k != "accuracy" or v is not None}

    def lines(self) -> dict[str, Any]:
        """Return the values to print, one per line."""
        return self.to_dict()

    def rows(self) -> list[dict[str, Any]]:
        """Return the table row of the checkpoint, as a list of one."""
        names = ("step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "block_size", "stride")
        return [{name: getattr(self, name) for name in names}]


@dataclass(frozen=True)
class HarnessScore:
    """The scores of a checkpoint on tasks of EleutherAI's lm-eval.

    Attributes:
        checkpoint: Path of the checkpoint.
        hash: A sha256 of its weights, the same for all forms of the checkpoint.
        step: Optimizer steps trained.
        block_size: Context length in tokens.
        lm_eval: Version of lm-eval.
        tasks: Values by task, and by lm-eval's ``METRIC,FILTER``.
    """

    checkpoint: str
    hash: str
    step: int
    block_size: int
    lm_eval: str
    tasks: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name."""
        return asdict(self)

    def lines(self) -> dict[str, Any]:
        """Return the values to print, one per line, with a line for each task and metric."""
        flat = {f"{row['task']} {row['metric']}": row["value"] for row in self.rows()}
        return {k: v for k, v in self.to_dict().items() if k != "tasks"} | flat

    def rows(self) -> list[dict[str, Any]]:
        """Return a table row for each task and metric."""
        return [
            {"step": self.step, "task": task, "metric": metric, "value": value}
            for task, numbers in self.tasks.items()
            for metric, value in numbers.items()
        ]


@dataclass(frozen=True)
class Report:
    """The scores of one or several checkpoints.

    Attributes:
        scores: One for each checkpoint.
        notes: Reasons why scores are not comparable, one sentence each.
    """

    scores: Sequence[Score | HarnessScore]
    notes: Sequence[str] = ()

    def names(self) -> list[str]:
        """Return the paths of the checkpoints, without the folder that they share."""
        return _without_common_folder([score.checkpoint for score in self.scores])

    def text(self) -> str:
        """Return a line for each value of a single checkpoint, or a table of several with notes below it."""
        if len(self.scores) == 1:
            values = self.scores[0].lines()
            width = max(13, *map(len, values)) + 1
            return "\n".join(f"{name:{width}}{_format(value)}" for name, value in values.items())
        names = self.names()
        rows = [{"checkpoint": names[i]} | row for i, score in enumerate(self.scores) for row in score.rows()]
        columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        cells = [columns, *([_format(row[name]) for name in columns] for row in rows)]
        sides = ["<" if isinstance(rows[0][name], str) else ">" for name in columns]
        shapes = [
            f"{side}{max(map(len, column))}" for side, column in zip(sides, zip(*cells, strict=True), strict=True)
        ]
        lines = ["  ".join(map(format, line, shapes)) for line in cells]
        return "\n".join([*(line.rstrip() for line in lines), *(f"note: {note}" for note in self.notes)])

    def save(self, file: Path) -> None:
        """Write JSON: an object, or a list of objects for several checkpoints.

        Raises:
            UserError: The file cannot be written; the message includes the JSON, so that the scores are not lost.
        """
        scores = [_finite(score.to_dict()) for score in self.scores]
        text = json.dumps(scores[0] if len(scores) == 1 else scores, indent=2)
        try:
            with atomic_file(file, mode="w") as out:
                out.write(text + "\n")
        except OSError as error:  # for example, a full disk
            raise UserError(f"--json {file} cannot be written: {error.strerror}; its content is {text}") from error


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "None" if value is None else str(value)


def _without_common_folder(paths: list[str]) -> list[str]:
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def _finite(value: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
