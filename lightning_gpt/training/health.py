"""Skip optimizer steps with bad numbers, report them, and stop a run that makes no others."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lightning_gpt.invocation import command_line
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.agreement import holds_for_all

EXIT_CODE = 3
# Steps over which the mean and variance of the gradient norm are taken, and before which no step is a spike.
_WINDOW = 100
_MOST_RECORDS = 1000  # steps between two reviews
_GRACE_SECONDS = 3.0  # for rank 0 to write run.json and to report


class BadNumbers(Exception):
    """Training cannot go on: too many bad steps in a row, or weights that are not finite. All ranks raise it."""


@contextmanager
def stopping_on_bad_numbers(trainer: Trainer, run_dir: Path) -> Iterator[None]:
    """Turn BadNumbers into one line that names the last good checkpoint, and exit code 3."""
    try:
        yield
    except BadNumbers as error:
        if trainer.is_global_zero:
            last = run_dir / "checkpoints" / "last.ckpt"
            advice = f"the last good checkpoint is {last}; to continue: {command_line('train', f'--resume {run_dir}')}"
            print(f"error: {error}; {advice if last.exists() else 'no checkpoint was saved'}", file=sys.stderr)
        else:
            time.sleep(_GRACE_SECONDS)  # a launcher kills rank 0, which is to speak, when another rank ends first
        # Lightning kills rank 0 if it sees a rank that it started exit with another code than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_rank_0 = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        raise SystemExit(0 if started_by_rank_0 else EXIT_CODE) from None


class SkipRule:
    """Select the steps to skip by their gradient norm, on the device: norms that are not finite, and spikes.

    A spike is a norm x above ``bound = mean + sigma * sqrt(variance)``. Mean and variance are exact over the first
    100 norms and exponential from there on (Finch 2009, "Incremental calculation of weighted mean and variance"): with
    a = 1 / min(n, 100) for the n-th norm and d = min(x, bound) - mean,

        mean <- mean + a d,  variance <- (1 - a) (variance + a d^2).

    A spike counts as the bound, so that a lasting rise is accepted after some steps. No step before the 101st is one.

    Args:
        sigma: Standard deviations above the mean; None skips no spikes.
        statistics: Mean, variance and n of earlier steps.
        device: Where the norms are.

    Attributes:
        bound: The bound that was applied last, a scalar on the device; inf where no norm is a spike.
    """

    def __init__(self, sigma: float | None, *, statistics: list[float], device: torch.device) -> None:
        self.sigma = sigma
        self.statistics = torch.tensor(statistics, device=device)
        self.bound = torch.tensor(math.inf, device=device)

    def __call__(self, norm: Tensor) -> Tensor:
        """Return 1 to skip the step with this gradient norm, else 0, as a float32 scalar."""
        norm = norm.float()
        if self.sigma is None:
            return torch.ne(norm * 0, 0, out=torch.empty_like(norm))
        finite = norm * 0 == 0
        mean, variance, count = self.statistics
        self.bound = torch.where(count < _WINDOW, math.inf, mean + self.sigma * variance.sqrt())
        weight = 1 / (count + 1).clamp(max=_WINDOW)
        change = norm.minimum(self.bound) - mean
        updated = torch.stack((mean + weight * change, (1 - weight) * (variance + weight * change.square()), count + 1))
        self.statistics = torch.where(finite, updated, self.statistics)
        return (~finite | (norm > self.bound)).float()


class Health(Callback):
    """Skip bad steps on all ranks alike, report them, and refuse to save weights that are not finite.

    A step is bad if the loss of a rank or the gradient norm is not finite, but not if only a loss scaler overflowed. A
    skipped step counts as a step for the data, the schedule and the budget.

    The device decides which steps to skip. The host reads what happened at logged steps, validations and saves, where
    it waits for the device anyway.

    Args:
        max_bad_steps: Number of bad steps in a row that stop the run; 0 stops it at the first.
        spike_sigma: See ``SkipRule``.
    """

    def __init__(self, *, max_bad_steps: int, spike_sigma: float | None) -> None:
        self.max_bad_steps = max_bad_steps
        self.spike_sigma = spike_sigma
        self.skipped_steps = 0
        self.bad_in_a_row = 0
        self._statistics = [0.0, 0.0, 0.0]
        self._rule: SkipRule | None = None
        # Gradient norm, this rank's loss, and bound for spikes, in column `step % width`, of the steps to review.
        self._records = torch.empty(3, 0)
        self._reviewed = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the statistics of the gradient norm."""
        statistics = self._rule.statistics.tolist() if self._rule else self._statistics
        return {"skipped_steps": self.skipped_steps, "bad_in_a_row": self.bad_in_a_row, "statistics": statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before the run starts."""
        self.skipped_steps, self.bad_in_a_row = state_dict["skipped_steps"], state_dict["bad_in_a_row"]
        self._statistics = state_dict["statistics"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module skip steps, after a checkpoint has been loaded."""
        assert isinstance(pl_module, GPTModule)
        device = pl_module.device
        self._rule = SkipRule(self.spike_sigma, statistics=self._statistics, device=device)
        pl_module.skip_steps(self._rule)
        width = min(trainer.log_every_n_steps, _MOST_RECORDS)  # type: ignore[attr-defined]
        self._records = torch.empty(3, width, device=device)
        self._reviewed = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record an optimizer step on the device, and review the last ones at logged steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, GPTModule) and self._rule is not None
        norm, step, width = pl_module.gradient_norm(), trainer.global_step, self._records.size(1)
        for record, value in zip(self._records, (norm, pl_module.step_loss, self._rule.bound), strict=True):
            cell = record[step % width]
            if isinstance(value, Tensor):
                cell.copy_(value)
            else:  # DeepSpeed's norm may be a number, or None if its configuration says not to compute it
                cell.fill_(0.0 if value is None else value)
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged or step - self._reviewed == width:
            self._review(trainer)
        if is_logged:
            pl_module.step_metrics["skipped_steps"] = float(self.skipped_steps)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Review the last steps before the model is validated."""
        if not trainer.sanity_checking:
            self._review(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Review the last steps, and refuse to save weights or optimizer state that are not finite."""
        assert isinstance(pl_module, GPTModule)
        self._review(trainer)
        if not holds_for_all(_is_finite(_state(pl_module, trainer))):
            raise BadNumbers(f"step {trainer.global_step}: weights or optimizer state are not finite and are not saved")
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _review(self, trainer: Trainer) -> None:
        """Read the records since the last review, count and report skipped steps, and stop the run if they are many."""
        steps = range(self._reviewed + 1, trainer.global_step + 1)
        if not steps:
            return
        self._reviewed = trainer.global_step
        columns = [step % self._records.size(1) for step in steps]
        norms, losses, bounds = ([record[c] for c in columns] for record in self._records.tolist())
        if all(math.isfinite(norm) and norm <= bound for norm, bound in zip(norms, bounds, strict=True)):
            self.bad_in_a_row = 0
            return
        # All ranks see the same norms, so all of them take part in this collective.
        bad_losses = self._records.new_zeros(trainer.world_size, len(steps))
        bad_losses[trainer.global_rank] = bad_losses.new_tensor([not math.isfinite(loss) for loss in losses])
        blamed = trainer.strategy.reduce(bad_losses, reduce_op="sum").T.tolist()
        is_scaled = loss_scale(trainer) > 1
        found: list[tuple[int, str]] = []
        for step, norm, bound, ranks in zip(steps, norms, bounds, blamed, strict=True):
            if any(ranks):
                names = [str(rank) for rank, is_bad in enumerate(ranks) if is_bad]
                reason = f"the loss is not finite on rank{'s' * (len(names) > 1)} {', '.join(names)}"
            elif not math.isfinite(norm):
                if is_scaled:  # the loss scaler overflowed; it skips the step and lowers the scale
                    continue
                reason = "the gradient norm is not finite, though the loss is on all ranks"
            else:
                if norm > bound:
                    found.append((step, f"the gradient norm {norm:.3g} is a spike, above {bound:.3g}"))
                self.bad_in_a_row = 0
                continue
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= self.max_bad_steps:
                _report(trainer, found)
                count = f"bad step {self.bad_in_a_row} in a row (--max_bad_steps {self.max_bad_steps})"
                raise BadNumbers(f"step {step}: {reason}, {count}")
            found.append((step, reason))
        self.skipped_steps += len(found)
        _report(trainer, found)


def _report(trainer: Trainer, found: list[tuple[int, str]]) -> None:
    """Print one line for each run of skipped steps with the same reason."""
    bar = trainer.progress_bar_callback
    say = print if bar is None else bar.print
    for (reason, _), group in groupby(enumerate(found), key=lambda item: (item[1][1], item[1][0] - item[0])):
        steps = [step for _, (step, _) in group]
        named = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        if trainer.is_global_zero:
            say(f"{named}: {reason}; skipped")


def loss_scale(trainer: Trainer) -> float:
    """Return the factor of the loss that fp16 training uses, 1 without one; waits for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        return scaler.get_scale()
    return float(getattr(trainer.optimizers[0], "loss_scale", 1.0))  # DeepSpeed's


def _state(module: GPTModule, trainer: Trainer) -> Iterator[Any]:
    """Yield the weights and the optimizer state, as this rank holds them.

    The last rank of ZeRO-3 holds padding too, in memory that DeepSpeed never initialises.
    """
    parameters: Iterator[Any] = module.model.parameters()
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            shard: Tensor = parameter.ds_tensor
            start = distributed.get_rank(parameter.ds_process_group) * shard.numel()
            yield shard[: max(0, parameter.ds_numel - start)]
        else:
            yield parameter
    optimizers: list[Any] = trainer.optimizers
    for optimizer in optimizers:
        shards = getattr(optimizer, "fp16_partitioned_groups", None)  # ZeRO-3
        for group, state in enumerate(getattr(optimizer, "optimizer", optimizer).state.values()):
            for value in state.values():
                if shards is None or not isinstance(value, Tensor) or not value.dim():
                    yield value
                    continue
                paddings = optimizer.groups_padding[group]
                for part, padding in zip(value.split([s.numel() for s in shards[group]]), paddings, strict=True):
                    yield part[: part.numel() - padding]


def _is_finite(tensors: Iterator[Any]) -> bool:
    """Return whether this rank's shares of tensors are finite; waits for the device."""
    held = []
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        tensor = tensor.detach()
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if tensor.numel():
            held.append(tensor)
    return math.isfinite(nn.utils.get_total_norm(held, norm_type=math.inf))
