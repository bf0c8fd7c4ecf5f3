"""Going on exactly where a run stopped, under any strategy and on any number of ranks."""

import copy
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gpt.checkpoint.base import Checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.implementations.sharding import shard_like, write_parameter
from lightning_gpt.models import GPTModule


class ExactResume(Callback):
    """Restores a checkpoint into whatever strategy the run has now, and keeps Lightning's counters true.

    Weights and optimizer state are read one tensor at a time, and every rank keeps its share. The schedule, a pure
    function of the step, and the optimizer's settings follow the flags of the run that goes on.

    The stream starts at the first sample not yet consumed, so the loop must not believe that it is in the middle of
    something: accumulation starts afresh, even with another number of micro-batches per step than before, and the
    total of micro-batches, which times the validations, is what the number of optimizer steps makes it.

    Args:
        checkpoint: Where to go on from; None for a fresh run.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs when the strategy has put model and optimizer where they live."""
        if self.checkpoint is None:
            return
        restore_weights(pl_module.model, self.checkpoint)
        restore_optimizer(pl_module.model, trainer.optimizers[0], self.checkpoint)
        step, header = self.checkpoint.step, self.checkpoint.header
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [b * f(step) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = step
        for callback in trainer.callbacks:
            state = header.get("callbacks", {}).get(callback.state_key)
            if state:
                state = copy.deepcopy(state)
                home = getattr(callback, "dirpath", None)
                if home and self.checkpoint.path.parent == Path(home).resolve():
                    state = _moved(state, old=state["dirpath"], new=home)
                callback.load_state_dict(state)
        plugin = trainer.precision_plugin
        if scale := header.get(type(plugin).__qualname__):
            plugin.load_state_dict(scale)
        trainer.datamodule.load_state_dict(header["TokenData"])
        self.checkpoint = None  # its files are open

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first batch is fetched."""
        loop = trainer.fit_loop.epoch_loop
        trainer.fit_loop.reset_restart_stage()
        loop.restarting = False
        done = trainer.global_step * trainer.accumulate_grad_batches
        total = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = done
        loop._batches_that_stepped = trainer.global_step


def _moved(state: Any, *, old: str, new: str) -> Any:
    """A callback's state with the folder that its files lie in now: without it, a moved run forgets its best."""
    if isinstance(state, dict):
        return {_moved(key, old=old, new=new): _moved(value, old=old, new=new) for key, value in state.items()}
    return new + state[len(old) :] if isinstance(state, str) and state.startswith(old) else state


def restore_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint's weights into a model, each rank its share; DeepSpeed's float32 masters included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write_weight(parameter, checkpoint.weight(name))
        for name, buffer in model.named_buffers():
            if name in checkpoint.stored:
                buffer.copy_(checkpoint.weight(name))


def write_weight(parameter: Tensor, full: Tensor) -> None:
    """Sets a parameter, or this rank's share of it, to a whole tensor; DeepSpeed's float32 master included."""
    write_parameter(parameter, full)
    _write_master(parameter, full)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Gives an optimizer a checkpoint's state, each rank its share.

    Args:
        model: The model, its weights restored.
        optimizer: A torch optimizer over its parameters, or DeepSpeed's over flat partitions of them.
        checkpoint: One that has an optimizer's state.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner is not optimizer:
        partitions = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3's
        for flat in optimizer.single_partition_of_fp32_groups if partitions is None else partitions:
            state = checkpoint.optimizer_state(next(iter(trained)))
            inner.state[flat] = {k: torch.zeros_like(flat) if v.dim() else v for k, v in state.items()}
            _restore_step(inner, flat)
        if partitions is None:
            optimizer._lazy_init_hp_params_optimizer_state()  # makes the parameters know their pieces of it
    for name, parameter in trained.items():
        state = checkpoint.optimizer_state(name)
        if inner is not optimizer:
            for key, value in state.items():
                if value.dim():
                    _write_master(parameter, value, key)
        else:
            inner.state[parameter] = {
                key: shard_like(parameter, value.to(parameter.dtype)) if value.dim() else value
                for key, value in state.items()
            }
            _restore_step(inner, parameter)


def _restore_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Puts the count of steps where this kind of optimizer keeps it."""
    state: dict[str, Any] = optimizer.state[parameter]
    if "step" not in state:
        return
    if isinstance(optimizer, torch.optim.Optimizer) and "fused" in optimizer.defaults:
        # As torch's own load_state_dict does it.
        on_device = optimizer.defaults["fused"] or optimizer.defaults.get("capturable")
        state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
        return
    state["step"] = int(state["step"])  # DeepSpeed's Adams count in plain numbers


def _write_master(parameter: Tensor, full: Tensor, key: str | None = None) -> None:
    """Writes this rank's share of a float32 master weight, or of the optimizer state ``key``, where DeepSpeed has one.

    ZeRO-3's own setter for whole values fails where a parameter does not divide by the ranks.
    """
    if not parameter.requires_grad:  # it is not trained, and has none
        return
    if hasattr(parameter, "ds_id"):
        if getattr(parameter, "_z3_optimizer", None) is None:  # no training, no masters
            return
        size = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        flat = full.flatten()
        mine = F.pad(flat[rank * size : (rank + 1) * size], (0, max(0, min(size, (rank + 1) * size - flat.numel()))))
        parameter._z3_optimizer.set_local_hp_param(mine, parameter, key)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(full, key)


def require_resumable(checkpoint: Checkpoint, module: GPTModule, *, max_steps: int) -> None:
    """Checks that a run can go on from a checkpoint.

    Raises:
        UserError: It does not fit the module, is another optimizer's or weights alone, or is at the end of the run
            already.
    """
    row, have, want = module.implementation, checkpoint.model_config, module.model_config
    # No shape shows these, or not always, or not in words that a user knows.
    shared = ("n_head", "gelu", "position", "block_size", "window", "softcap")
    for name in shared if row.builtin and row.name == checkpoint.implementation else ():
        said, theirs = want.get(name), have.get(name, getattr(row.load(row.config), name, None))
        if said is not None and theirs is not None and said != theirs:
            raise UserError(f"--{name} {said} contradicts {checkpoint.path}, whose {name} is {theirs}; say the same")
    checkpoint.require_fit(module)
    if not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds weights alone; start from it with --init_from")
    theirs, ours = checkpoint.optimizer, module.optimizer_row.name
    if theirs != ours:
        raise UserError(
            f"{checkpoint.path} was trained with --optimizer {theirs}, with whose state {ours} cannot go on; give"
            f" --optimizer {theirs}, or start a new run from it with --init_from"
        )
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad and not checkpoint.was_trained(name):
            raise UserError(f"{checkpoint.path} did not train {name}; resume it with --freeze_embeddings")
    if checkpoint.step >= max_steps:
        raise UserError(f"{checkpoint.path} is at step {checkpoint.step} of {max_steps} already; raise --max_steps")
