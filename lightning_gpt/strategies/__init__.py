"""The registry of strategies: a name to a Lightning strategy and to the form of module that it needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.strategies.devices import LIGHTNING_PRECISIONS, Devices, find_devices, peak_flops
from lightning_gpt.strategies.memory import MemoryRules, Replicated, ShardedUnits, Zero

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["STRATEGIES", "StrategyRow", "device_arguments", "find_devices", "get_strategy", "peak_flops"]


@dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """One row of the registry.

    Attributes:
        name: What ``--strategy`` calls it.
        build: Makes the Lightning strategy for the devices at hand.
        form: The form of module that it trains: "plain", "fsdp" or "deepspeed".
        form_options: Further arguments of that form.
        memory: How it divides memory over its ranks.
        precisions: Lightning's names of the precisions that it computes in.
    """

    name: str
    build: "Callable[[Devices], Strategy | str]"
    memory: MemoryRules
    form: str = "plain"
    form_options: dict[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = LIGHTNING_PRECISIONS

    def arguments(self, where: Devices) -> dict[str, Any]:
        """The Trainer arguments that say where to run.

        Raises:
            UserError: Something that the strategy needs is not installed.
        """
        return {
            "accelerator": where.accelerator,
            "devices": where.devices,
            "num_nodes": where.num_nodes,
            "strategy": self.build(where),
            "precision": where.precision,
        }


def _ddp(devices: Devices) -> "Strategy":
    from lightning.pytorch.strategies import DDPStrategy

    # Gradients live in the communication buckets, which saves a copy per step.
    return DDPStrategy(gradient_as_bucket_view=True)


def _fsdp(devices: Devices) -> "Strategy":
    from lightning_gpt.strategies.fsdp import FSDP

    return FSDP(world_size=devices.world_size, accelerator=devices.accelerator)


def _deepspeed(devices: Devices, **settings: Any) -> "Strategy":
    from lightning_gpt.strategies.deepspeed import build_deepspeed

    return build_deepspeed(accelerator=devices.accelerator, **settings)


def _zero(name: str, *, rules: Zero, config: dict[str, Any] | None = None) -> StrategyRow:
    return StrategyRow(
        name=name,
        build=partial(_deepspeed, stage=rules.stage, offload=rules.offload, config=config),
        memory=rules,
        form="deepspeed",
        form_options={"offload": rules.offload, "fused_adam": not rules.offload},
        precisions=tuple(name for name in LIGHTNING_PRECISIONS if name != "64-true"),
    )


STRATEGIES: dict[str, StrategyRow] = {
    row.name: row
    for row in (
        StrategyRow(name="auto", build=lambda devices: "auto", memory=Replicated()),
        StrategyRow(name="ddp", build=_ddp, memory=Replicated(bucketed=True)),
        StrategyRow(
            name="fsdp",
            build=_fsdp,
            memory=ShardedUnits(),
            form="fsdp",
            precisions=("bf16-mixed", "32-true", "16-true", "bf16-true"),
        ),
        _zero("deepspeed_stage_1", rules=Zero(stage=1)),
        _zero("deepspeed_stage_2", rules=Zero(stage=2)),
        _zero("deepspeed_stage_3", rules=Zero(stage=3)),
        _zero("deepspeed_stage_2_offload", rules=Zero(stage=2, offload=True)),
        _zero("deepspeed_stage_3_offload", rules=Zero(stage=3, offload=True)),
    )
}
ALIASES = {"deepspeed": "deepspeed_stage_2", "fsdp_native": "fsdp"}
# Names beside which --deepspeed_config makes sense: they leave open what a DeepSpeed configuration says.
STAGE_BY_CONFIG = (TrainerOptions.strategy, "deepspeed")


def get_strategy(options: TrainerOptions, *, where: Devices, decided: dict[str, Any] | None = None) -> StrategyRow:
    """The row that the options ask for; one made for it where they name a DeepSpeed configuration.

    Args:
        options: The Trainer's options.
        where: The devices that they come to.
        decided: The values of what a DeepSpeed configuration could say, too, but the run's own options decide.

    Raises:
        UserError: There is no such strategy, it lacks the precision, or the DeepSpeed configuration does not fit.
    """
    name = ALIASES.get(options.strategy, options.strategy)
    if name not in STRATEGIES:
        raise UserError(f"--strategy {options.strategy} is unknown; choose one of {', '.join([*STRATEGIES, *ALIASES])}")
    if name == TrainerOptions.strategy and where.world_size > 1:
        name = "ddp"  # Lightning would take it as well, without the settings that we give it
    row = STRATEGIES[name]
    if where.precision not in row.precisions:
        raise UserError(
            f"--precision {options.precision} does not work under --strategy {options.strategy};"
            f" choose one of {', '.join(row.precisions)}"
        )
    if options.deepspeed_config is None:
        return row
    if options.strategy not in STAGE_BY_CONFIG:
        raise UserError(f"--deepspeed_config decides the stage; give --strategy deepspeed, not {options.strategy}")
    from lightning_gpt.strategies.deepspeed import read_config, zero_rules

    config = read_config(options.deepspeed_config, precision=where.precision, decided=decided or {})
    return _zero("deepspeed", rules=zero_rules(config), config=config)


def device_arguments(options: TrainerOptions) -> dict[str, Any]:
    """The Trainer arguments that say where to run: accelerator, devices, num_nodes, strategy, precision.

    Raises:
        UserError: What was asked for is not here, or does not go together.
    """
    where = find_devices(options)
    return get_strategy(options, where=where).arguments(where)
