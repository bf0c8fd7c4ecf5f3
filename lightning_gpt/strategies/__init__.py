"""The registry of strategies: how to build each one, its memory rules, and the settings that it supports."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.strategies.devices import LIGHTNING_PRECISIONS, Devices, find_devices, peak_flops
from lightning_gpt.strategies.memory import MemoryRules, Replicated, ShardedUnits, Zero

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["LIGHTNING_PRECISIONS", "STRATEGIES", "StrategyRow", "device_arguments", "find_devices", "get_strategy"]
__all__ += ["peak_flops"]


@dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """One row of the registry.

    Attributes:
        name: Value of ``--strategy``.
        build: Builds the Lightning strategy for the given devices.
        memory: Rules for its memory per rank.
        form: The form of GPTModule that it trains, a key of ``lightning_gpt.models.FORMS``.
        form_options: Further arguments of that form.
        precisions: Lightning's names of the precisions that it supports.
        clip_algorithms: Values of Lightning's ``gradient_clip_algorithm`` that it supports.
        chooses: What the strategy comes to on one device, and on several; None if its name says it.
        deepspeed_engine: Whether DeepSpeed's engine runs the optimizer, which must then have ``build_deepspeed``.
    """

    name: str
    build: "Callable[[Devices], Strategy | str]"
    memory: MemoryRules
    form: str = "plain"
    form_options: dict[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = LIGHTNING_PRECISIONS
    clip_algorithms: tuple[str, ...] = ("norm", "value")
    chooses: tuple[str, str] | None = None
    deepspeed_engine: bool = False

    @property
    def replicates(self) -> bool:
        """Whether every rank holds all weights."""
        return isinstance(self.memory, Replicated)

    def with_average(self) -> "StrategyRow":
        """Return the row of a run that also keeps an average of the weights, on a strategy that replicates them."""
        assert isinstance(self.memory, Replicated)
        return replace(self, memory=replace(self.memory, averaged=True))

    def describe(self, *, world_size: int) -> str:
        """Return the name, with what it comes to on this number of devices."""
        return f"{self.name} ({self.chooses[world_size > 1]})" if self.chooses else self.name

    def arguments(self, where: Devices) -> dict[str, Any]:
        """Return the Trainer arguments that say where to run.

        Raises:
            UserError: A package that the strategy needs is not installed.
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

    # Gradients as views of the communication buckets save one copy per step.
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
        build=partial(
            _deepspeed,
            stage=rules.stage,
            offload=rules.offload,
            offload_weights=rules.offload_weights,
            config=config,
        ),
        memory=rules,
        form="deepspeed",
        form_options={"offload": rules.offload, "fused_adam": not rules.offload},
        precisions=tuple(name for name in LIGHTNING_PRECISIONS if name != "64-true"),
        clip_algorithms=("norm",),
        deepspeed_engine=True,
    )


STRATEGIES: dict[str, StrategyRow] = {
    row.name: row
    for row in (
        StrategyRow(name="auto", build=lambda devices: "auto", memory=Replicated(), chooses=("one process", "ddp")),
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
        _zero("deepspeed_stage_3_offload", rules=Zero(stage=3, offload=True, offload_weights=True)),
    )
}
ALIASES = {"deepspeed": "deepspeed_stage_2", "fsdp_native": "fsdp"}
# The values of --strategy that leave the stage to --deepspeed_config.
STAGE_BY_CONFIG = (TrainerOptions.strategy, "deepspeed")


def get_strategy(options: TrainerOptions, *, where: Devices, decided: dict[str, Any] | None = None) -> StrategyRow:
    """Return the row for ``--strategy``, or a new row for ``--deepspeed_config``.

    Args:
        options: The Trainer's options.
        where: The devices of the run.
        decided: DeepSpeed settings that the run's own options determine, by DeepSpeed's names.

    Raises:
        UserError: The strategy is unknown, does not support the precision, or the DeepSpeed configuration does not fit.
    """
    name = ALIASES.get(options.strategy, options.strategy)
    if name not in STRATEGIES:
        raise UserError(f"--strategy {options.strategy} is unknown; choose one of {', '.join([*STRATEGIES, *ALIASES])}")
    if name == TrainerOptions.strategy and where.world_size > 1:
        name = "ddp"  # Lightning would choose it too, but without our settings
    row = STRATEGIES[name]
    if where.device_type == "mps" and (name != TrainerOptions.strategy or options.deepspeed_config):
        raise UserError(
            f"--strategy {options.strategy} does not work on an Apple GPU; leave it out, or use --accelerator cpu"
        )
    if where.precision not in row.precisions:
        raise UserError(
            f"--precision {where.precision} does not work under --strategy {options.strategy};"
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
    """Return the Trainer arguments accelerator, devices, num_nodes, strategy and precision.

    Raises:
        UserError: The devices are not here, or the options exclude each other.
    """
    where = find_devices(options)
    return get_strategy(options, where=where).arguments(where)
