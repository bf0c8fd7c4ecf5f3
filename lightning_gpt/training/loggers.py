"""The loggers that a run can have; one that cannot write costs a warning, not the run."""

import contextlib
import csv
import math
import os
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_gpt.atomic import atomic_file
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.training.callbacks import warn

_Base: Any = object  # typed so, because the methods of a mixin call those of the class that follows it


@runtime_checkable
class TextLogger(Protocol):
    """A logger that takes texts."""

    def log_sample(self, text: str, *, step: int) -> None:
        """Log what the model wrote at a step."""


class _Tolerant(_Base):
    """A mixin for loggers of files: warn once when writing fails, and again when it fails after a success."""

    _fails = False

    @property
    def experiment(self) -> Any:
        """Lightning's writer, which creates its files at the first use, but no run folder that was removed."""
        try:
            os.stat(str(self.save_dir))
            if getattr(rank_zero_only, "rank", 0) == 0:
                self._prepare()
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

    def _prepare(self) -> None:
        """Prepare the files of a resumed run, before they are opened."""

    def _start_again(self) -> None:
        """Prepare to write again after an error."""


class _Csv(_Tolerant, CSVLogger):
    """Lightning's CSV logger, which keeps what it could not write for the next time, and continues a file.

    Args:
        run: The run folder.
        version: Number of the folder of logs.
        step: Step at which the run starts; the rows until then are kept.
    """

    def __init__(self, run: Path, *, version: int, step: int) -> None:
        super().__init__(run, name="logs", version=version)
        self._step = step

    def _prepare(self) -> None:
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _GrowingFile(self.log_dir, step=self._step)


class _GrowingFile(ExperimentWriter):
    """Lightning's writer of ``metrics.csv``, which continues the file instead of removing it.

    Args:
        log_dir: Folder of the file.
        step: Rows of later steps are removed, because the run repeats these steps.
    """

    def __init__(self, log_dir: str, *, step: int) -> None:
        self._step = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        try:
            with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if _step_of(row) <= self._step]
        except FileNotFoundError:
            return
        self.metrics_keys = sorted(set().union(*rows))
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Replace the file at once, so that a run that is killed loses nothing."""
        with atomic_file(Path(self.metrics_file_path), mode="w") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)


def _step_of(row: Mapping[Any, Any]) -> float:
    """Return the step of a row; infinity for a row that was not written to its end."""
    try:
        return math.inf if None in row or None in row.values() else int(row["step"])
    except (LookupError, TypeError, ValueError):
        return math.inf


def _version(run: Path, options: RunOptions, step: int | None, *, file: str) -> int:
    """Return the number of the folder of logs: a new one, or for a resumed run the newest that holds such a file."""
    if options.overwrite:  # the old ones will have been removed
        return 0
    last = _newest(run, "") if step is None else _newest(run, file)
    if last is None:
        return _newest(run, "") or 0
    return last if step is not None else last + 1


def _newest(run: Path, file: str) -> int | None:
    """Return the highest number N of a folder logs/version_N that holds a file; None if there is none."""
    found = {
        path.relative_to(run / "logs").parts[0].removeprefix("version_") for path in run.glob(f"logs/version_*/{file}")
    }
    return max((int(number) for number in found if number.isdecimal()), default=None)


class _TensorBoard(_Tolerant, TensorBoardLogger):
    """Lightning's TensorBoard logger, which shows settings as text, and goes on in a new file after an error."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)
        rows = [f"|{name}|{value}|" for name, value in params.items() if value is not None]
        with self._tolerated():
            self.experiment.add_text("settings", "\n".join(["|option|value|", "|---|---|", *rows]))

    @rank_zero_only
    def log_sample(self, text: str, *, step: int) -> None:
        with self._tolerated():
            self.experiment.add_text("sample", textwrap.indent(text, " " * 4, lambda line: True), step)  # as it is

    def _start_again(self) -> None:
        self._experiment = None  # its thread has ended
        self._kwargs.pop("purge_step", None)  # it would hide the steps since the run was resumed


_default_hook = threading.excepthook


def _without_writers(args: Any) -> None:
    """Report an uncaught error of a thread, but not of TensorBoard's writer: the next call of the logger raises it."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        _default_hook(args)


def _tensorboard(run: Path, options: RunOptions, step: int | None) -> Logger:
    threading.excepthook = _without_writers
    version = _version(run, options, step, file="events.*")
    goes_on: dict[str, Any] = {} if step is None else {"purge_step": step + 1}
    return _TensorBoard(run, name="logs", version=version, default_hp_metric=False, **goes_on)


def _csv(run: Path, options: RunOptions, step: int | None) -> Logger:
    return _Csv(run, version=_version(run, options, step, file="metrics.csv"), step=step or 0)


class _Wandb(WandbLogger):
    """Lightning's logger for wandb, with a table of samples."""

    @rank_zero_only
    def log_sample(self, text: str, *, step: int) -> None:
        self.log_text("samples", columns=["step", "text"], data=[[str(step), text]], step=step)


def _wandb(run: Path, options: RunOptions, step: int | None) -> Logger:
    # wandb's folders are wandb/run-DATE_TIME-ID and wandb/offline-run-DATE_TIME-ID.
    earlier = sorted(run.glob("wandb/*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    goes_on = earlier[-1].name.rpartition("-")[2] if earlier and step is not None else None
    tags = _tags(options) or None
    return _Wandb(save_dir=run, name=options.run_name or run.name, project=options.project, tags=tags, version=goes_on)


class _MLflow(MLFlowLogger):
    """Lightning's logger for MLflow, which continues the run that it started; samples are texts among its artifacts.

    Without ``MLFLOW_TRACKING_URI`` it writes a database to the run folder.

    Args:
        run: The run folder.
        options: The run's options.
        goes_on: Whether the run is resumed.
    """

    def __init__(self, run: Path, options: RunOptions, *, goes_on: bool) -> None:
        self._file = run / "logs" / "mlflow.txt"  # the id of the run
        self._goes_on = goes_on and self._file.is_file()
        server = os.environ.get("MLFLOW_TRACKING_URI")
        super().__init__(
            experiment_name=options.project or "lightning-gpt",
            run_name=options.run_name or run.name,
            tracking_uri=server or f"sqlite:///{run.resolve() / 'mlflow.db'}",
            artifact_location=None if server else (run.resolve() / "mlflow").as_uri(),
            tags=dict.fromkeys(_tags(options), "true") or None,
            run_id=self._file.read_text() if self._goes_on else None,
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the settings of a new run, and remember its id. MLflow does not let a run change its settings."""
        if not self._goes_on:
            super().log_hyperparams(params)
            self._file.parent.mkdir(exist_ok=True)
            self._file.write_text(str(self.run_id))

    @rank_zero_only
    def log_sample(self, text: str, *, step: int) -> None:
        self.experiment.log_text(self.run_id, text, f"samples/{step}.txt")


def _mlflow(run: Path, options: RunOptions, step: int | None) -> Logger:
    return _MLflow(run, options, goes_on=step is not None)


def _tags(options: RunOptions) -> list[str]:
    return [tag for tag in map(str.strip, (options.tags or "").split(",")) if tag]


LOGGERS: dict[str, Callable[[Path, RunOptions, int | None], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def make_loggers(options: RunOptions, run_dir: Path, *, step: int | None) -> list[Logger]:
    """Return the loggers of a run; each creates its files when it is first used.

    Args:
        options: The run's options.
        run_dir: The run folder.
        step: Step at which the run is resumed, whose logs go on from there; None for a new run.

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
        return [LOGGERS[name](run_dir, options, step) for name in names]
    except ModuleNotFoundError as error:
        raise UserError(f"--logger {options.logger}: {error}; pip install it or choose another") from error
