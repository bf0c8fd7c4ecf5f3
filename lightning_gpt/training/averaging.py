"""Keep an exponential moving average of the weights (``--ema``), which is validated, saved, sampled and exported."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_gpt.checkpoint import Checkpoint
from lightning_gpt.checkpoint.base import PREFIX
from lightning_gpt.checkpoint.resume import restore_weights
from lightning_gpt.config import TrainConfig, UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies import STRATEGIES, StrategyRow
from lightning_gpt.strategies.devices import Devices


def averaged(config: TrainConfig, strategy: StrategyRow, where: Devices) -> StrategyRow:
    """Return the strategy of a run, whose memory includes the average of the weights if the run keeps one.

    Raises:
        UserError: The strategy shards the weights, or the precision is too coarse for small changes.
    """
    ema = config.optim.ema
    if not ema:
        return strategy
    if not strategy.replicates:
        able = [name for name, row in STRATEGIES.items() if row.replicates]
        raise UserError(
            f"--ema {ema:g} does not work under --strategy {strategy.name}, which shards; choose {' or '.join(able)},"
            " or give --ema 0"
        )
    if where.precision in ("16-true", "bf16-true"):
        raise UserError(
            f"--ema {ema:g} would be rounded away in weights of --precision {where.precision}; give a mixed precision"
            " or 32"
        )
    return strategy.with_average()


class Average(WeightAveraging):
    """Lightning's weight averaging, with a checkpoint that resumes exactly.

    After step 1 the average is the weights; after each later step it is ``decay * average + (1 - decay) * weights``.
    Validations swap it with the weights. At the end of training it takes their place for the final sample.

    Args:
        decay: Share of the old average that each step keeps, from 0 to 1.
        resumed: The checkpoint that the run continues; None for a new run.
    """

    def __init__(self, decay: float, *, resumed: Checkpoint | None) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._resumed = resumed
        self._is_swapped = False  # the module holds the average, and the average model the weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for ``on_fit_start``: here the weights are not on their device yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model, after a checkpoint or initial weights have been loaded into it."""
        assert isinstance(pl_module, GPTModule)
        self._average_model = AveragedModel(pl_module.model, use_buffers=self._use_buffers, **self._kwargs)
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()  # its value is read in each step
        if self._resumed is not None and self._resumed.has_average:
            restore_weights(self._average_model.module, self._resumed)
            self._average_model.n_averaged.fill_(trainer.global_step)
        self._resumed = None  # close its files
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average; before the first step there is none."""
        if self._has_average:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the weights."""
        if self._is_swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module; the weights are kept for a save that is tried again."""
        if self._has_average:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the checkpoint's weights, and the weights under Lightning's name for them.

        A signal may stop the run within a validation, while the two are swapped.
        """
        if not self._has_average:
            return
        assert self._average_model is not None
        other = {PREFIX + name: tensor for name, tensor in self._average_model.module.state_dict().items()}
        weights, average = (other, checkpoint["state_dict"]) if self._is_swapped else (checkpoint["state_dict"], other)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    @property
    def _has_average(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged)

    def _swap(self, module: LightningModule) -> None:
        self._swap_models(module)
        self._is_swapped = not self._is_swapped
