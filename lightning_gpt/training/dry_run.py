"""A dry run: the devices that it plans for, and what it prints instead of training."""

import math
from dataclasses import replace

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.config import TrainConfig, TrainerOptions, UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.planning import (
    Candidate,
    Cost,
    Machine,
    Timing,
    Traces,
    cost_table,
    facts,
    machine_here,
    parse_machine,
    plan,
    side_by_side,
    table,
)
from lightning_gpt.strategies import STRATEGIES, StrategyRow, find_devices, get_strategy
from lightning_gpt.strategies.devices import Devices, memory_of_this
from lightning_gpt.training.averaging import averaged
from lightning_gpt.training.budget import Budget
from lightning_gpt.training.trainer import check_optimizer

ALL = "all"  # --dry_run all plans every strategy


def devices_of(config: TrainConfig) -> tuple[TrainConfig, Devices, Machine | None]:
    """Return the config with the devices that ``--on`` names, these devices, and the machine, if one is named.

    Raises:
        UserError: There are no such devices, ``--on`` is wrong or contradicts other flags, or ``--dry_run`` has an
            unknown value.
    """
    run, trainer = config.run, config.trainer
    if run.dry_run not in (True, False, ALL):
        raise UserError(f"--dry_run {run.dry_run} is unknown; give --dry_run alone, or --dry_run {ALL}")
    if run.dry_run == ALL and trainer.deepspeed_config:
        raise UserError(
            f"--deepspeed_config {trainer.deepspeed_config}: --dry_run {ALL} plans the strategies that need no file;"
            " give --dry_run alone"
        )
    price = run.price_per_gpu_hour
    if price is not None and not (run.dry_run and 0 <= price < math.inf):
        raise UserError(f"--price_per_gpu_hour {price:g} is for --dry_run; give it a price from 0")
    if run.on is None:
        return config, find_devices(trainer, elsewhere=bool(run.dry_run)), None
    if not run.dry_run:
        raise UserError(f"--on {run.on} is for --dry_run; give --gpus and --num_nodes to train")
    for name in ("accelerator", "devices", "gpus", "num_nodes"):
        if getattr(trainer, name) != getattr(TrainerOptions, name):
            raise UserError(f"--{name} {getattr(trainer, name)}: --on {run.on} decides it; leave it out")
    machine = parse_machine(run.on)
    trainer = replace(trainer, gpus=machine.gpus, num_nodes=machine.nodes)
    where = find_devices(trainer, elsewhere=True, card=machine.card)
    return replace(config, trainer=trainer), where, machine


@rank_zero_only
def print_plans(
    config: TrainConfig,
    module: GPTModule,
    budget: Budget,
    *,
    strategy: StrategyRow,
    where: Devices,
    machine: Machine | None,
) -> None:
    """Print what the run would need in memory and compute; with ``--dry_run all``, under every strategy.

    Args:
        config: The run.
        module: The module; its model may be on the meta device.
        budget: Length and batch size of the run.
        strategy: The run's strategy.
        where: The devices, which need not be on this machine.
        machine: The machine that ``--on`` names.
    """
    device_type = "cuda" if where.accelerator == "gpu" else "cpu"
    traces = Traces(
        module,
        block_size=budget.block_size,
        accumulate=budget.accumulate,
        precision=where.precision,
        device_type=device_type,
    )
    cards = machine or machine_here(where)
    if config.run.dry_run != ALL:
        needed = plan(
            traces,
            rules=strategy.memory,
            world_size=where.world_size,
            devices_per_node=where.per_node,
            batch_size=budget.batch_size,
            steps=budget.max_steps,
            recompute=config.trainer.recompute,
            machine=cards,
            tf32=config.trainer.tf32,
        )
        cost = _cost(needed.timing, cards, config, budget)
        print(needed.table(cost=cost.lines() if cost else ()))
        return
    limit = machine.memory if machine else memory_of_this(where)
    rows = side_by_side(
        traces,
        _candidates(config, where),
        world_size=where.world_size,
        devices_per_node=where.per_node,
        batch_size=budget.batch_size,
        limit=limit,
        machine=cards,
        tf32=config.trainer.tf32,
    )
    tokens = budget.tokens_per_step
    parameters = sum(p.numel() for p in module.parameters())
    print(facts(parameters, tokens=tokens, flops=traces.flops_per_token * tokens, steps=budget.max_steps))
    print(table(rows, limit=limit, batch_size=budget.batch_size))
    costs = [(row.strategy, row.recompute, _cost(row.timing, cards, config, budget)) for row in rows]
    known = [(name, recompute, cost) for name, recompute, cost in costs if cost]
    if known:
        print(cost_table(known))


def _cost(timing: Timing | None, machine: Machine | None, config: TrainConfig, budget: Budget) -> Cost | None:
    """Return the cost of the run; None if its cards are unknown."""
    if timing is None or machine is None:
        return None
    return Cost(
        timing=timing,
        machine=machine,
        steps=budget.max_steps,
        tokens_per_step=budget.tokens_per_step,
        price=config.run.price_per_gpu_hour,
    )


def _candidates(config: TrainConfig, where: Devices) -> list[Candidate]:
    """Return every strategy, each with the reason why this run cannot use it, if there is one."""
    found = []
    for name, row in STRATEGIES.items():
        refused = ""
        try:
            get_strategy(replace(config.trainer, strategy=name, deepspeed_config=None), where=where)
            check_optimizer(config, row)
            row = averaged(config, row, where)
        except UserError as error:
            refused = str(error).partition(";")[0]
        if name != TrainerOptions.strategy:
            found.append(Candidate(name=name, rules=row.memory, refused=refused))
    return found
