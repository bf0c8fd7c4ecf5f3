"""What the LightningModules add for strategies that shard: how the model is built, optimised, clipped and restored.

Mixed in before a GPTModule. Under a plain single-device Trainer each form trains like the plain module.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gpt.implementations.compilation import compile_arguments
from lightning_gpt.implementations.sharding import give_memory, initialise, shard_fsdp

if TYPE_CHECKING:
    from lightning_gpt.models.module import GPTModule

    _Base = GPTModule
else:
    _Base = object


class ShardedForm(_Base):
    """A module that holds no weights until its strategy says where they live."""

    configured = False

    def build_model(self) -> nn.Module:
        """The model without memory, on the meta device; a model that cannot be initialised there is built whole."""
        compile_arguments(self.compile_setting)  # refuses now; blocks are compiled where they are sharded
        return self.new_model(meta=self.implementation.initialises_by_apply)

    @property
    def strategy(self) -> Any | None:
        """The Trainer's strategy; None without a Trainer."""
        return self._trainer.strategy if self._trainer is not None else None

    @property
    def unbuilt(self) -> bool:
        """Whether the model has no memory yet."""
        return any(p.is_meta for p in self.model.parameters())


class FSDPForm(ShardedForm):
    """Shards itself over the device mesh of the FSDP strategy."""

    def configure_model(self) -> None:
        """Shards, then gives every rank memory for its shares alone, and initialises them."""
        if self.configured:
            return
        self.configured = True
        self.prepare_blocks(self.model)
        unbuilt = self.unbuilt
        if self._device_mesh is not None:  # where the FSDP strategy has set one
            mesh, block_class = self._device_mesh["data_parallel"], self.implementation.block_class()
            shard_fsdp(self.model, mesh=mesh, block_class=block_class, precision=str(self.trainer.precision))
        if unbuilt:
            give_memory(self.model, self.strategy.root_device if self._device_mesh is not None else torch.device("cpu"))


class DeepSpeedForm(ShardedForm):
    """Builds itself partitioned under ZeRO-3, and takes the optimizer that DeepSpeed is fastest with.

    Args:
        args: The plain module's.
        fused_adam: DeepSpeed's FusedAdam where the weights are on a GPU.
        offload: DeepSpeed's CPUAdam, for optimizer states in the host's memory.
        kwargs: The plain module's.

    Raises:
        RuntimeError: Both are asked for.
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
        """What DeepSpeed shards; None under another strategy."""
        config = getattr(self.strategy, "config", None)
        return config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else None

    def configure_model(self) -> None:
        """Gives the model memory and initial weights; under ZeRO-3 inside of Lightning's ``zero.Init``.

        A model that was built whole is left to the DeepSpeed engine, which partitions it.
        """
        if self.configured:
            return
        self.configured = True
        if self.unbuilt and self.zero_stage == 3:
            state = torch.get_rng_state()  # what the constructors draw is thrown away
            self.model = self.new_model(meta=False)
            torch.set_rng_state(state)
            initialise(self.model)
        elif self.unbuilt:
            give_memory(self.model, torch.device("cpu"))
        self.prepare_blocks(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch, times their number: both Lightning and the engine divide by it."""
        loss = super().training_step(batch, batch_idx)
        return loss if self.zero_stage is None else loss * self.trainer.accumulate_grad_batches

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """DeepSpeed's Adam where it fits, torch's otherwise."""
        on_gpu = self.strategy is not None and self.strategy.root_device.type == "cuda"
        assert self.optimizer_row.build_deepspeed is not None
        return self.optimizer_row.build_deepspeed(
            groups,
            learning_rate=self.learning_rate,
            betas=self.betas,
            fused=self.fused_adam and on_gpu,
            on_host=self.offload and (self.zero_stage is not None or not on_gpu),
        )

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Leaves clipping to the DeepSpeed engine, where there is one."""
        if self.zero_stage is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def gradient_norm(self) -> Tensor | float | None:
        """The gradient's norm before clipping, which the engine knows after its step."""
        return super().gradient_norm() if self.zero_stage is None else self.strategy.model.get_global_grad_norm()
