"""Write run.json: what a run is, how far it has come, and its loss curves; and draw them into loss.png."""

import contextlib
import importlib.util
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_gpt.atomic import atomic_file
from lightning_gpt.charts import save_chart
from lightning_gpt.config import UserError
from lightning_gpt.data.loading import TokenData
from lightning_gpt.training.callbacks import RunMetrics, peak_memory, warn
from lightning_gpt.training.curves import LOSSES, CurveLogger, columns, curves_until, draw_curves, thinned
from lightning_gpt.training.stopping import Stopped

SUMMARY = "run.json"
CHART = "loss.png"
_FORMAT = 1
_LIVE_SECONDS = 10  # between two writes in training


class Summary(Callback):
    """Write run.json on rank 0: at the start, validations, saves and the end, and at logged steps every 10 seconds.

    A file that cannot be written is tried again at the next occasion, and costs a warning at the end, not the run. The
    run's log and checkpoints, which need the same disk, report it at once.

    Args:
        run_dir: The run folder.
        facts: What is known before training, in the order of the file.
        metrics: The callback that measures the speed.
        source: A checkpoint that is resumed; the run.json of its folder begins the curves.
        step: Step of that checkpoint.
        draws: Whether to draw loss.png at the end, and at validations 10 seconds after the start or the last drawing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        facts: dict[str, Any],
        metrics: RunMetrics,
        source: Path | None = None,
        step: int = 0,
        draws: bool = True,
    ) -> None:
        self.file = run_dir / SUMMARY
        self.facts = facts
        self.metrics = metrics
        earlier = read_summary(source.parent.parent / SUMMARY) if source else {}
        curves, seconds = curves_until(step, earlier)
        self.logger = CurveLogger(curves, seconds=seconds)
        self.started = earlier.get("started")
        self._peak = float(earlier.get("peak_memory_mib") or 0)
        self.draws = draws
        self._drawn = 0.0  # time of the last chart, or of the start
        self._written = (-1, 0.0)  # step and time of the last write

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and write the file, so that a run that has begun can be seen."""
        self.logger.start()
        self._drawn = time.monotonic()
        self._write(trainer, pl_module, status="running")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write after a logged step, if the last write is long ago."""
        step, (written, when) = trainer.global_step, self._written
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged and step != written and time.monotonic() - when >= _LIVE_SECONDS:
            self._write(trainer, pl_module, status="running")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write after a validation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, status="running")
            if time.monotonic() - self._drawn >= _LIVE_SECONDS:
                self._draw(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write before a checkpoint, so that the curves of a run that resumes from it have no gap."""
        if trainer.global_step != self._written[0]:
            self._write(trainer, pl_module, status="running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and warn if it cannot be written."""
        self._draw(trainer)
        error = self._write(trainer, pl_module, status="stopped")
        if error:
            warn(f"{self.file} cannot be written: {error.strerror or error}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the state in which a signal or an error has ended the run.

        Nothing is drawn, which takes a second: a launcher may kill this process as soon as another one has ended.
        """
        has_failed = isinstance(exception, Exception) and not isinstance(exception, Stopped)
        self._write(trainer, pl_module, status="failed" if has_failed else "stopped")

    def _draw(self, trainer: Trainer) -> None:
        """Draw loss.png; an error leaves the last one, because run.json and the log report a disk that is full."""
        if not self.draws or not trainer.is_global_zero:
            return
        if importlib.util.find_spec("matplotlib") is None:
            self.draws = False
            warn(f"{CHART} is not drawn: pip install matplotlib")
            return
        name, size = self.facts["implementation"], self.facts["parameters"]
        figure = draw_curves(self.logger.curves, title=f"{self.facts['name']}: {name}, {size:,} parameters")
        with contextlib.suppress(UserError):
            save_chart(figure, self.file.with_name(CHART))
        self._drawn = time.monotonic()

    def _write(self, trainer: Trainer, module: LightningModule, *, status: str) -> OSError | None:
        # An exception may come before the first write, when the trainer has no data yet.
        if not trainer.is_global_zero or self._written[0] < 0 and status != "running":
            return None
        self._written = (trainer.global_step, time.monotonic())
        try:
            with atomic_file(self.file, mode="w") as file:
                content = self._content(trainer, module, status=status).items()
                lines = (f" {json.dumps(name)}: {json.dumps(value, default=str)}" for name, value in content)
                file.write("{\n" + ",\n".join(lines) + "\n}\n")
        except OSError as error:
            return error
        return None

    def _content(self, trainer: Trainer, module: LightningModule, *, status: str) -> dict[str, Any]:
        step = trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenData)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.started = self.started or now
        self._peak = max(self._peak, peak_memory(module.device) / 2**20)
        train, validation = (self.logger.curves[name] for name in LOSSES)
        scored = [point for point in validation if point.loss is not None]
        best = min(scored, key=lambda point: point.loss or 0.0, default=None)
        speed = self.metrics.seconds_per_step()
        return {
            "format": _FORMAT,
            **self.facts,
            "status": "finished" if step >= trainer.max_steps and status != "running" else status,
            "started": self.started,
            "updated": now,
            "step": step,
            "max_steps": trainer.max_steps,
            "tokens": data.state_dict()["consumed_samples"] * data.block_size,
            "seconds": round(self.logger.seconds, 3),
            "step_time_ms": speed and round(speed * 1e3, 3),
            "tokens_per_second": speed and round(self.metrics.tokens_per_step / speed, 1),
            "peak_memory_mib": round(self._peak, 1),
            "train_loss": train[-1].loss if train else None,
            "val_loss": validation[-1].loss if validation else None,
            "best_val_loss": best and best.loss,
            "best_step": best and best.step,
            "curves": {name: columns(thinned(points)) for name, points in self.logger.curves.items()},
        }


def read_summary(file: Path) -> dict[str, Any]:
    """Return the content of a run.json; empty if there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else {}
