"""The loggers that a run can have; one that cannot write costs a warning, not the run."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.training.callbacks import warn

_Base: Any = object  # typed so, because the methods of a mixin call those of the class that follows it


class _Tolerant(_Base):
    """A mixin for loggers of files: warn once when writing fails, and again when it fails after a success."""

    _fails = False

    @property
    def experiment(self) -> Any:
        """Lightning's writer, which creates its files at the first use, but no run folder that was removed."""
        try:
            os.stat(str(self.save_dir))
            return super().experiment
        except OSError as error:
            raise UserError(f"{self._reason(error)}; choose another --out_dir, or --logger none") from error

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        with self._tolerated():
            super().log_metrics(*args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with self._tolerated():
            super().log_hyperparams(*args, **kwargs)

    def save(self) -> None:
        with self._tolerated():
            super().save()
            self._fails = False

    def finalize(self, status: str) -> None:
        with self._tolerated():
            super().finalize(status)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__  # Lightning's TensorBoard logger makes a ValueError of every error
            if cause is None:
                raise
            if not self._fails:
                warn(f"{self._reason(cause)}; training goes on without it")
            self._fails = True
            self._start_again()

    def _reason(self, error: OSError) -> str:
        path = os.fsdecode(error.filename or self.save_dir)
        return f"the log cannot be written: {path}: {error.strerror or error}"

    def _start_again(self) -> None:
        """Prepare to write again after an error."""


class _Csv(_Tolerant, CSVLogger):
    """Lightning's CSV logger, which keeps what it could not write for the next time."""


class _TensorBoard(_Tolerant, TensorBoardLogger):
    """Lightning's TensorBoard logger, which shows settings as text, and goes on in a new file after an error."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)
        rows = [f"|{name}|{value}|" for name, value in params.items() if value is not None]
        with self._tolerated():
            self.experiment.add_text("settings", "\n".join(["|option|value|", "|---|---|", *rows]))

    def _start_again(self) -> None:
        self._experiment = None  # its thread has ended


_default_hook = threading.excepthook


def _without_writers(args: Any) -> None:
    """Report an uncaught error of a thread, but not of TensorBoard's writer: the next call of the logger raises it."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        _default_hook(args)


def _tensorboard(run: Path, options: RunOptions) -> Logger:
    threading.excepthook = _without_writers
    return _TensorBoard(run, name="logs", default_hp_metric=False)


def _wandb(run: Path, options: RunOptions) -> Logger:
    tags = _tags(options) or None
    return WandbLogger(save_dir=run, name=options.run_name or run.name, project=options.project, tags=tags)


def _tags(options: RunOptions) -> list[str]:
    return [tag for tag in map(str.strip, (options.tags or "").split(",")) if tag]


LOGGERS: dict[str, Callable[[Path, RunOptions], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": lambda run, options: _Csv(run, name="logs"),
    "wandb": _wandb,
}


def make_loggers(options: RunOptions, run_dir: Path) -> list[Logger]:
    """Return the loggers of a run; each creates its files when it is first used.

    Raises:
        UserError: A name is unknown or given twice, or a package is missing.
    """
    if options.logger == "none":
        return []
    names = [name.strip() for name in options.logger.split(",")]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--logger {name} is unknown; choose some of {', '.join(LOGGERS)}, or none")
        if names.count(name) > 1:
            raise UserError(f"--logger {options.logger} names {name} twice")
    try:
        return [LOGGERS[name](run_dir, options) for name in names]
    except ModuleNotFoundError as error:
        raise UserError(f"--logger {options.logger}: {error}; pip install it or choose another") from error
