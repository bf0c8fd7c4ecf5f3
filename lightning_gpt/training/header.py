"""What a run prints before it starts: model, data, budget and devices, and for a dry run the plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.config import SIZES
from lightning_gpt.data.loading import Source
from lightning_gpt.models import GPTModule
from lightning_gpt.planning import plan
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.strategies.memory import MemoryRules


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run is, and how its batches are made.

    Attributes:
        max_steps: Optimizer steps.
        batch_size: Sequences per device and micro-batch.
        block_size: Tokens per sequence.
        accumulate: Micro-batches per optimizer step.
        world_size: Number of devices.
        global_batch_tokens: Value of the flag from which ``accumulate`` was derived; None if it was given directly.
    """

    max_steps: int
    batch_size: int
    block_size: int
    accumulate: int
    world_size: int
    global_batch_tokens: int | None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all devices."""
        return self.batch_size * self.block_size * self.accumulate * self.world_size


@rank_zero_only
def print_header(
    module: GPTModule, source: Source, budget: Budget, *, loaded: Sequence[str], where: Devices, strategy: str
) -> None:
    """Print what is about to run.

    Args:
        module: The module to train.
        source: Where samples come from.
        budget: The length of the run.
        loaded: Lines about the weights that the run starts from.
        where: The devices.
        strategy: Name of the strategy.
    """
    parameters = sum(p.numel() for p in module.parameters())
    fields, sizes = module.model_config, budget
    named = f"{module.implementation.name} {'/'.join(str(fields[s]) for s in SIZES if s in fields)}".strip()
    derived = ", from --global_batch_tokens" if sizes.global_batch_tokens is not None else ""
    print(
        *(f"{line}\n" for line in loaded),
        f"model     {named}, block {sizes.block_size}, {parameters:,} parameters\n"
        f"data      {source.describe()}, vocabulary {source.vocab_size:,}\n"
        f"steps     {sizes.max_steps:,} of {sizes.tokens_per_step:,} tokens ({sizes.batch_size} x {sizes.block_size} x"
        f" {sizes.accumulate} micro-batches x {sizes.world_size} devices{derived})\n"
        f"strategy  {strategy}, {where.precision}, {where.accelerator}",
        sep="",
    )


@rank_zero_only
def print_plan(module: GPTModule, budget: Budget, *, rules: MemoryRules, where: Devices, recompute: bool) -> None:
    """Print what the run would need in memory and compute.

    Args:
        module: The module, which may be without memory.
        budget: The length of the run.
        rules: The strategy's memory rules.
        where: The devices, which need not be here.
        recompute: Whether blocks recompute their activations.
    """
    needed = plan(
        module,
        rules=rules,
        world_size=where.world_size,
        devices_per_node=where.per_node,
        batch_size=budget.batch_size,
        block_size=budget.block_size,
        accumulate=budget.accumulate,
        steps=budget.max_steps,
        precision=where.precision,
        recompute=recompute,
        device_type="cuda" if where.accelerator == "gpu" else "cpu",
    )
    print(needed.table())
