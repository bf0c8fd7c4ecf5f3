"""Build the Lightning Trainer of a run: its options, logger and callbacks."""

import math
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_gpt.checkpoint import Checkpoint
from lightning_gpt.checkpoint.initial import InitialWeights
from lightning_gpt.config import TrainConfig, TrainerOptions, UserError
from lightning_gpt.config.elsewhere import TRAINER as DECIDED
from lightning_gpt.optim.registry import check_options, get_optimizer
from lightning_gpt.strategies import StrategyRow
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.strategies.saving import WholeFiles
from lightning_gpt.training.budget import Budget
from lightning_gpt.training.callbacks import DropoutSeed, Patience, ProgressBar, RunMetrics, ValidateAtEnd
from lightning_gpt.training.health import Health
from lightning_gpt.training.loggers import make_loggers
from lightning_gpt.training.saving import Checkpoints
from lightning_gpt.training.summary import Summary


def check_trainer_options(options: TrainerOptions) -> None:
    """Raise a UserError for --trainer options that Lightning does not have, or that other flags set."""
    known = set(signature(Trainer.__init__).parameters) - {"self"}
    for name in options.trainer:
        if name in DECIDED:
            flag = DECIDED[name]
            raise UserError(
                f"--trainer.{name} is set by lightning-gpt itself; {f'give {flag}' if flag else 'leave it out'}"
            )
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"--trainer.{name}: lightning.Trainer has no such option{hint}")


def check_optimizer(config: TrainConfig, strategy: StrategyRow) -> None:
    """Raise a UserError for options of other optimizers, and for an optimizer or clipping that the strategy lacks."""
    name, algorithm = config.optim.optimizer, config.trainer.trainer.get("gradient_clip_algorithm") or "norm"
    if strategy.deepspeed_engine:
        get_optimizer(name).require_deepspeed()
    check_options(name, config.optimizer_fields)
    if algorithm not in strategy.clip_algorithms:
        raise UserError(
            f"--trainer.gradient_clip_algorithm {algorithm} does not work under --strategy {config.trainer.strategy};"
            f" choose one of {', '.join(strategy.clip_algorithms)}"
        )


def make_callbacks(
    config: TrainConfig, run_dir: Path, metrics: RunMetrics, summary: Summary, *, resumed: Checkpoint | None
) -> list[Callback]:
    """Return the callbacks of every run; `resumed` is the checkpoint that it continues."""
    wanted = config.trainer.trainer.get("enable_progress_bar", True)
    bar = [ProgressBar(summary.logger)] if wanted else []
    patience = [Patience(config.trainer.patience)] if config.trainer.patience else []
    run = config.run
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        save_interval=run.save_interval,
        keep=run.keep,
        on_error=run.on_save_error,
        resumes=resumed is not None,
        best_loss=resumed.best_loss if resumed and resumed.settings else math.inf,
    )
    return [
        DropoutSeed(run.seed),
        Health(max_bad_steps=config.optim.max_bad_steps, spike_sigma=config.optim.spike_sigma),
        ValidateAtEnd(),
        checkpoints,
        *bar,
        *patience,
        metrics,  # after the bar, which must close before the last line is printed
        summary,
    ]


def make_trainer(
    config: TrainConfig,
    strategy: StrategyRow,
    where: Devices,
    run_dir: Path,
    *,
    callbacks: list[Callback],
    budget: Budget,
    step: int | None,
) -> Trainer:
    """Return the Trainer, for a run that is resumed at `step`; None for a new run.

    Raises:
        UserError: The Trainer rejects an option, or the logger is unknown.
    """
    options = config.trainer
    summaries = [callback.logger for callback in callbacks if isinstance(callback, Summary)]
    ours: dict[str, Any] = {
        **strategy.arguments(where),
        "plugins": [WholeFiles()],
        "logger": [*make_loggers(config.run, run_dir, step=step), *summaries],
        "callbacks": callbacks,
        "max_epochs": -1,
        "max_steps": budget.max_steps,
        "accumulate_grad_batches": budget.accumulate,
        "gradient_clip_val": config.optim.gradient_clip_val or None,
        "val_check_interval": options.eval_interval * budget.accumulate,
        "check_val_every_n_epoch": None,
        # Score initial weights before the first step, so that the user sees where fine-tuning starts.
        "num_sanity_val_steps": -1 if any(isinstance(callback, InitialWeights) for callback in callbacks) else 0,
        "log_every_n_steps": options.log_every_n_steps,
        # Where Lightning looks for the checkpoints of its own SLURM requeueing, in which no other run's may be.
        "default_root_dir": run_dir,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
    assert ours.keys() <= set(DECIDED)
    try:
        return Trainer(**ours, **options.trainer)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"lightning.Trainer rejects its options: {error}") from error
