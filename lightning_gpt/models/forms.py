"""GPTModule for strategies that shard: how the model is built, optimised and clipped.

Under a plain single-device Trainer each form trains exactly like GPTModule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.implementations.sharding import give_memory, initialise, shard_fsdp
from lightning_gpt.models.module import DeferredModule, GPTModule


class ShardedModule(DeferredModule):
    """A module whose model is allocated in ``configure_model``, when the strategy can place each shard."""

    configured = False

    @property
    def strategy(self) -> Any | None:
        """The Trainer's strategy; None without a Trainer."""
        return self._trainer.strategy if self._trainer is not None else None

    @property
    def is_unbuilt(self) -> bool:
        """Whether the model has no memory yet."""
        return any(p.is_meta for p in self.model.parameters())


class FSDPGPTModule(ShardedModule):
    """Any implementation under FSDP; the module shards its model over the strategy's device mesh."""

    def configure_model(self) -> None:
        """Shard the model, then allocate and initialise this rank's shards."""
        if self.configured:
            return
        self.configured = True
        self.prepare_blocks(self.model)
        unbuilt, device = self.is_unbuilt, torch.device("cpu")
        if self._device_mesh is not None:  # set by the FSDP strategy
            assert self.strategy is not None
            mesh, block_class = self._device_mesh["data_parallel"], self.implementation.block_class()
            shard_fsdp(self.model, mesh=mesh, block_class=block_class, precision=str(self.trainer.precision))
            device = self.strategy.root_device
        if unbuilt:
            give_memory(self.model, device)


class DeepSpeedGPTModule(ShardedModule):
    """Any implementation under DeepSpeed, with DeepSpeed's own Adam. ZeRO-3 partitions the model while it is built.

    Args:
        args: See GPTModule.
        fused_adam: Whether to use DeepSpeed's FusedAdam if the weights are on a GPU.
        offload: Whether to use DeepSpeed's CPUAdam, for optimizer state in host memory.
        kwargs: See GPTModule.

    Raises:
        RuntimeError: Both FusedAdam and CPUAdam are requested.
        UserError: The optimizer does not work under DeepSpeed.
    """

    def __init__(self, *args: Any, fused_adam: bool = True, offload: bool = False, **kwargs: Any) -> None:
        if fused_adam and offload:
            raise RuntimeError(
                "Cannot use FusedAdam and CPUAdam at the same time! "
                "Please set either `fused_adam` or `offload` to False."
            )
        super().__init__(*args, **kwargs)
        self.optimizer_row.require_deepspeed()
        self.fused_adam = fused_adam
        self.offload = offload

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None under another strategy."""
        config = getattr(self.strategy, "config", None)
        return config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else None

    def configure_model(self) -> None:
        """Allocate and initialise the model; under ZeRO-3 only this rank's partition.

        Lightning calls this inside ``zero.Init``. The DeepSpeed engine partitions a model that was built whole.
        """
        if self.configured:
            return
        self.configured = True
        if self.is_unbuilt and self.zero_stage == 3:
            state = torch.get_rng_state()  # restored, because the constructor's random values are discarded
            self.model = self.new_model(meta=False)
            torch.set_rng_state(state)
            initialise(self.model)
        elif self.is_unbuilt:
            give_memory(self.model, torch.device("cpu"))
        self.prepare_blocks(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss times the number of micro-batches, by which Lightning and the engine both divide."""
        loss = super().training_step(batch, batch_idx)
        return loss if self.zero_stage is None else loss * self.trainer.accumulate_grad_batches

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return DeepSpeed's Adam where it works, else torch's."""
        on_gpu = self.strategy is not None and self.strategy.root_device.type == "cuda"
        assert self.optimizer_row.build_deepspeed is not None
        return self.optimizer_row.build_deepspeed(
            groups,
            learning_rate=self.learning_rate,
            betas=self.betas,
            fused=self.fused_adam and on_gpu,
            on_host=self.offload and (self.zero_stage is not None or not on_gpu),
            **self.optimizer_options,
        )

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Leave clipping to the DeepSpeed engine, if there is one."""
        if self.zero_stage is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def skip_steps(self, rule: Callable[[Tensor], Tensor]) -> None:
        """Skip the steps that a rule selects, as ``GPTModule.skip_steps`` does.

        ZeRO itself skips steps whose gradient norm is not finite. It reads the norm on the host in every step, so the
        rule may do so as well.
        """
        super().skip_steps(rule)
        if self.zero_stage is None:
            return
        assert self.strategy is not None
        zero = self.strategy.model.optimizer
        update, skips = zero._optimizer_step, False

        def update_unless_skipped(group: int) -> None:
            nonlocal skips
            norm: Tensor | None = zero._global_grad_norm
            if group == 0:
                skips = norm is not None and bool(rule(norm))
            if not skips:
                update(group)

        zero._optimizer_step = update_unless_skipped

    def gradient_norm(self) -> Tensor | float | None:
        """Return the gradient norm before clipping, as the engine reports it after its step; inf if it skipped it."""
        if self.zero_stage is None:
            return super().gradient_norm()
        assert self.strategy is not None
        return self.strategy.model.get_global_grad_norm()


FORMS: dict[str, type[GPTModule]] = {"plain": GPTModule, "fsdp": FSDPGPTModule, "deepspeed": DeepSpeedGPTModule}
"""The forms of GPTModule, by ``StrategyRow.form``."""
