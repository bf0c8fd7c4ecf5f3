"""Derive a run's numbers from its options: steps, accumulation, and the module's arguments."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.config import SIZES, OptimOptions, TrainConfig, UserError
from lightning_gpt.data.loading import TokenData
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.optim.registry import get_optimizer
from lightning_gpt.optim.schedule import SHAPES
from lightning_gpt.strategies.devices import Devices

DEFAULT_STEPS = 1000
DEFAULT_DECAY_FRACTION = 0.2
DEFAULT_PRESET = "gpt-micro"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length of a run, and size of its batches.

    Attributes:
        max_steps: Optimizer steps.
        batch_size: Sequences per device and micro-batch.
        block_size: Tokens per sequence.
        accumulate: Micro-batches per optimizer step.
        world_size: Number of devices.
        global_batch_tokens: Value of ``--global_batch_tokens``, from which ``accumulate`` follows; None if not given.
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


def accumulation(config: TrainConfig, *, world_size: int) -> int:
    """Return the micro-batches per optimizer step: the given number, or as many as the global batch needs."""
    wanted, given = config.optim.global_batch_tokens, config.optim.accumulate_grad_batches
    if wanted is None:
        return given or 1
    batch_size, block_size = config.data.batch_size, config.model.block_size
    tokens = batch_size * block_size * world_size
    if wanted % tokens:
        nearest = max(1, round(wanted / tokens)) * tokens
        raise UserError(
            f"--global_batch_tokens {wanted} is not a multiple of the {tokens} tokens of a micro-batch on all devices"
            f" (batch_size {batch_size} x block_size {block_size} x {world_size} devices); give {nearest}, or another"
            " --batch_size"
        )
    return wanted // tokens


def make_budget(config: TrainConfig, where: Devices, data: TokenData, *, accumulate: int) -> Budget:
    """Return the length of a run in steps, and the size of its batches."""
    options, block_size = config.trainer, config.model.block_size
    samples_per_step = config.data.batch_size * accumulate * where.world_size
    max_steps = options.max_steps or DEFAULT_STEPS
    if options.max_tokens is not None:
        max_steps = math.ceil(options.max_tokens / (samples_per_step * block_size))
    elif options.max_epochs is not None:
        max_steps = math.ceil(options.max_epochs * data.stream.n_windows / samples_per_step)
    return Budget(
        max_steps=max_steps,
        batch_size=config.data.batch_size,
        block_size=block_size,
        accumulate=accumulate,
        world_size=where.world_size,
        global_batch_tokens=config.optim.global_batch_tokens,
    )


def resolve(config: TrainConfig, budget: Budget, *, precision: str) -> TrainConfig:
    """Return a run with every default filled in that depends on other options.

    Of options that exclude each other, only one is set: the budget is in steps.
    """
    row = get_implementation(config.model.implementation)
    model_type = config.model.model_type
    if row.presets and not all(config.model_fields.get(size) for size in SIZES):
        model_type = model_type or DEFAULT_PRESET
    sizes = row.resolve(model_type=model_type, **config.model_fields)
    optim = _resolve_schedule(config.optim, resumes=config.resumed is not None)
    _check_schedule(optim, max_steps=budget.max_steps)
    constant = optim.schedule == "constant"
    decay_steps = optim.lr_decay_steps or budget.max_steps
    floor = optim.min_learning_rate
    if floor is None and not constant:
        floor = optim.learning_rate / 10
    return replace(
        config,
        model=replace(config.model, model_type=model_type),
        model_fields={name: sizes.get(name) for name in config.model_fields},
        optim=replace(
            optim,
            lr_decay_steps=None if constant else decay_steps,
            warmup_steps=min(100, decay_steps // 10) if optim.warmup_steps is None else optim.warmup_steps,
            min_learning_rate=floor,
            accumulate_grad_batches=None if optim.global_batch_tokens else budget.accumulate,
        ),
        optimizer_fields=config.optimizer_fields | get_optimizer(optim.optimizer).complete(config.optimizer_fields),
        trainer=replace(
            config.trainer, max_steps=budget.max_steps, max_tokens=None, max_epochs=None, precision=precision
        ),
    )


def module_arguments(config: TrainConfig, *, vocab_size: int, padding: int) -> dict[str, Any]:
    """Return the arguments of GPTModule after the implementation's name, for a run that ``resolve`` has completed."""
    row = get_implementation(config.model.implementation)
    if padding and "vocab_padding" not in {option.name for option in row.config_options()}:
        raise UserError(
            f"--pad_vocab: the config of --implementation {row.name} has no field vocab_padding, without which padding"
            " would be sampled"
        )
    fields = row.resolve(
        **config.model_fields,
        vocab_size=vocab_size,
        vocab_padding=padding or None,
        block_size=config.model.block_size,
    )
    optim = config.optim
    decay_steps, fraction = optim.lr_decay_steps, optim.decay_fraction
    floor = optim.learning_rate if optim.min_learning_rate is None else optim.min_learning_rate
    return {
        "model_config": fields,
        "weight_decay": optim.weight_decay,
        "learning_rate": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "optimizer": optim.optimizer,
        **get_optimizer(optim.optimizer).complete(config.optimizer_fields),
        "warmup_steps": optim.warmup_steps,
        "schedule": optim.schedule,
        "decay_steps": decay_steps,
        "cooldown_steps": None
        if fraction is None or decay_steps is None
        else cooldown_length(decay_steps, fraction=fraction),
        "final_lr_ratio": floor / optim.learning_rate,
        "compile": config.trainer.compile,
        "recompute": config.trainer.recompute,
        "loss": config.trainer.loss,
        "freeze_embeddings": config.run.freeze_embeddings,
    }


def decay_fraction(optim: OptimOptions) -> float:
    """Return the fraction of wsd's schedule that is the cool-down."""
    return DEFAULT_DECAY_FRACTION if optim.decay_fraction is None else optim.decay_fraction


def cooldown_length(decay_steps: int, *, fraction: float) -> int:
    """Return the steps of a cool-down that takes a fraction of a schedule of `decay_steps` steps."""
    return round(fraction * decay_steps)


def describe_schedule(optim: OptimOptions, *, cooldown_steps: int | None) -> str:
    """Return one line that says what the learning rate does after the warm-up; empty for the default schedule."""
    peak, floor, end = optim.learning_rate, optim.min_learning_rate, optim.lr_decay_steps
    if optim.schedule == OptimOptions.schedule:
        return ""
    if end is None:
        return f"{optim.schedule}: {peak:g} after {optim.warmup_steps} steps of warm-up"
    start = optim.warmup_steps if cooldown_steps is None else end - cooldown_steps
    return f"{optim.schedule}: {peak:g} until step {start:,}, then down to {floor:g} at step {end:,}"


def _resolve_schedule(optim: OptimOptions, *, resumes: bool) -> OptimOptions:
    """Fill in wsd's cool-down, and reset options that the schedule does not use; a UserError if those were given.

    A resumed run may change its schedule: its saved options then need no mention.
    """
    name = optim.schedule
    if name not in SHAPES:
        raise UserError(f"--schedule {name} is unknown; choose one of {', '.join(SHAPES)}")
    if name == "wsd":
        return replace(optim, decay_fraction=decay_fraction(optim))
    unused = ["decay_fraction", *(["lr_decay_steps", "min_learning_rate"] if name == "constant" else [])]
    for option in unused:
        if getattr(optim, option) is not None and not resumes:
            raise UserError(f"--{option} has no effect under --schedule {name}; leave it out, or give another schedule")
    reset: dict[str, Any] = dict.fromkeys(unused)
    return replace(optim, **reset)


def _check_schedule(optim: OptimOptions, *, max_steps: int) -> None:
    """Raise a UserError for a learning-rate schedule that contradicts itself; warn if the warm-up outlasts the run."""
    peak, floor = optim.learning_rate, optim.min_learning_rate
    if floor is not None and floor > peak:
        raise UserError(f"--min_learning_rate {floor} is above --learning_rate {peak}; give at most the latter")
    warmup, end = optim.warmup_steps, optim.lr_decay_steps
    if warmup and end is not None and warmup > end:
        raise UserError(f"--warmup_steps {warmup} is longer than --lr_decay_steps {end}; give fewer steps")
    if warmup and warmup > max_steps:
        _warn(
            f"--warmup_steps {warmup} lasts longer than the run's {max_steps} steps, so the learning rate never reaches"
            f" {peak}"
        )


@rank_zero_only
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
