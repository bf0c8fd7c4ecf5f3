"""Resume exactly where a run stopped, under any strategy and on any number of ranks."""

import copy
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gpt.checkpoint.base import Checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.implementations.sharding import shard_like, write_parameter
from lightning_gpt.models import GPTModule
from lightning_gpt.parsing import brief


class ExactResume(Callback):
    """Load a checkpoint under the run's current strategy, and set Lightning's counters to match.

    Weights and optimizer state are read one tensor at a time, and each rank keeps its share. The learning rate, a pure
    function of the step, and the optimizer's settings come from the flags of the resumed run.

    The stream starts at the first sample that was not consumed, so Lightning's loop must not resume in the middle of an
    epoch or an accumulation. Accumulation starts over, possibly with another number of micro-batches per step. The
    total of micro-batches, which determines when to validate, is recomputed from the optimizer steps.

    Args:
        checkpoint: The checkpoint to resume; None for a new run.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the checkpoint, after the strategy has placed model and optimizer."""
        if self.checkpoint is None:
            return
        assert isinstance(pl_module, GPTModule)
        restore_weights(pl_module.model, self.checkpoint, trained=True)
        restore_optimizer(pl_module.model, trainer.optimizers[0], self.checkpoint)
        step, header = self.checkpoint.step, self.checkpoint.header
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [b * f(step) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = step
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            state = header.get("callbacks", {}).get(callback.state_key)
            if state:
                try:
                    callback.load_state_dict(copy.deepcopy(state))
                except (LookupError, TypeError, ValueError) as error:
                    what = f"the state of {type(callback).__name__} cannot be used: {brief(error)}"
                    raise UserError(f"{self.checkpoint.path}: {what}") from error
        plugin = trainer.precision_plugin
        if scale := header.get(type(plugin).__qualname__):
            plugin.load_state_dict(scale)
        trainer.datamodule.load_state_dict(header["TokenData"])  # type: ignore[attr-defined]
        self.checkpoint = None  # close its files

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the loop's counters before the first batch is fetched."""
        loop = trainer.fit_loop.epoch_loop
        trainer.fit_loop.reset_restart_stage()
        loop.restarting = False
        done = trainer.global_step * trainer.accumulate_grad_batches
        total: Any = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = done
        loop._batches_that_stepped = trainer.global_step


def restore_weights(model: nn.Module, checkpoint: Checkpoint, *, trained: bool = False) -> None:
    """Load a checkpoint's weights into a model, including DeepSpeed's float32 masters; each rank loads its share.

    Args:
        model: The model.
        checkpoint: A checkpoint that fits it.
        trained: Whether to load the weights that training continues from, where the stored ones are their average.
    """
    read = checkpoint.trained_weight if trained else checkpoint.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write_weight(parameter, read(name))
        for name, buffer in model.named_buffers():
            if name in checkpoint.stored:
                buffer.copy_(read(name))


def write_weight(parameter: Tensor, full: Tensor) -> None:
    """Set a parameter, or this rank's share of it, and DeepSpeed's float32 master from the full tensor."""
    write_parameter(parameter, full)
    _write_master(parameter, full)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's optimizer state; each rank loads its share.

    Args:
        model: The model, with its weights loaded.
        optimizer: A torch optimizer over the model's parameters, or DeepSpeed's over flat partitions of them.
        checkpoint: A checkpoint with optimizer state.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner is optimizer:
        for name, parameter in trained.items():
            optimizer.state[parameter] = {
                key: shard_like(parameter, value.to(parameter.dtype)) if value.dim() else value
                for key, value in checkpoint.optimizer_state(name).items()
            }
            _restore_step(optimizer, parameter)
        return
    deepspeed: Any = optimizer
    partitions = getattr(deepspeed, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    for flat in deepspeed.single_partition_of_fp32_groups if partitions is None else partitions:
        state = checkpoint.optimizer_state(next(iter(trained)))
        inner.state[flat] = {k: torch.zeros_like(flat) if v.dim() else v for k, v in state.items()}
        _restore_step(inner, flat)
    if partitions is None:
        deepspeed._lazy_init_hp_params_optimizer_state()  # gives parameters views of the flat state
    for name, parameter in trained.items():
        for key, value in checkpoint.optimizer_state(name).items():
            if value.dim():
                _write_master(parameter, value, key)


def _restore_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Store the step count in this optimizer's format."""
    state: dict[str, Any] = optimizer.state[parameter]
    if "step" not in state:
        return
    if isinstance(optimizer, torch.optim.Optimizer) and "fused" in optimizer.defaults:
        # As in torch's own load_state_dict.
        on_device = optimizer.defaults["fused"] or optimizer.defaults.get("capturable")
        state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
        return
    state["step"] = int(state["step"])  # DeepSpeed's Adams use int


def _write_master(parameter: Any, full: Tensor, key: str | None = None) -> None:
    """Write this rank's share of DeepSpeed's float32 master weight, or of the optimizer state `key`, if there is one.

    ZeRO-3's own setter for full values fails if the parameter's size is not divisible by the number of ranks.
    """
    if not parameter.requires_grad:  # frozen parameters have no master
        return
    if hasattr(parameter, "ds_id"):
        if getattr(parameter, "_z3_optimizer", None) is None:  # there are no masters in evaluation
            return
        size = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        flat = full.flatten()
        share = F.pad(flat[rank * size : (rank + 1) * size], (0, max(0, min(size, (rank + 1) * size - flat.numel()))))
        parameter._z3_optimizer.set_local_hp_param(share, parameter, key)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(full, key)


def require_resumable(checkpoint: Checkpoint, module: GPTModule, *, max_steps: int) -> None:
    """Check that a run can resume a checkpoint.

    Raises:
        UserError: It does not fit the module, was trained with another optimizer, holds no optimizer state, or is at
            the end of the run.
    """
    _require_same_fields(checkpoint, module)
    checkpoint.require_fit(module)
    if not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds only weights; start from it with --init_from")
    if "averaging_state" in checkpoint.header and not checkpoint.has_average:
        raise UserError(f"{checkpoint.path} holds only the average of the weights; resume what it was converted from")
    theirs, ours = checkpoint.optimizer, module.optimizer_row.name
    if theirs != ours:
        raise UserError(
            f"{checkpoint.path} was trained with --optimizer {theirs}, and {ours} cannot use its state; give"
            f" --optimizer {theirs}, or start a new run from it with --init_from"
        )
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad and not checkpoint.was_trained(name):
            raise UserError(f"{checkpoint.path} did not train {name}; resume it with --freeze_embeddings")
    if checkpoint.step >= max_steps:
        raise UserError(f"{checkpoint.path} is already at step {checkpoint.step} of {max_steps}; raise --max_steps")


def _require_same_fields(checkpoint: Checkpoint, module: GPTModule) -> None:
    """Raise a UserError if a config field differs from the checkpoint's and would change what its weights mean."""
    row = module.implementation
    if row.name != checkpoint.implementation:
        return  # reported with the weights that do not fit
    want, have = row.complete(module.model_config), row.complete(checkpoint.model_config)
    for name in sorted(want.keys() - {"vocab_size", "vocab_padding"}):  # these have been compared with the data
        ours, theirs = (list(v) if isinstance(v, tuple) else v for v in (want[name], have[name]))  # JSON has no tuples
        if ours != theirs and not row.may_change(name):
            raise UserError(f"--{name} {ours} contradicts {checkpoint.path}, whose {name} is {theirs}; leave it out")
