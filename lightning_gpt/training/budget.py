"""Derive a run's numbers from its options: steps, accumulation, and the module's arguments."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_gpt.config import SIZES, TrainConfig, UserError
from lightning_gpt.data.loading import TokenData
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.optim.registry import get_optimizer
from lightning_gpt.strategies.devices import Devices

DEFAULT_STEPS = 1000
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


def module_arguments(config: TrainConfig, *, vocab_size: int, padding: int, max_steps: int) -> dict[str, Any]:
    """Return the arguments of GPTModule after the implementation's name."""
    row = get_implementation(config.model.implementation)
    if padding and "vocab_padding" not in {option.name for option in row.config_options()}:
        raise UserError(
            f"--pad_vocab: the config of --implementation {row.name} has no field vocab_padding, without which padding"
            " would be sampled"
        )
    model_type = config.model.model_type
    if row.presets and not all(config.model_fields.get(size) for size in SIZES):
        model_type = model_type or DEFAULT_PRESET
    fields = row.resolve(
        model_type=model_type,
        **config.model_fields,
        vocab_size=vocab_size,
        vocab_padding=padding or None,
        block_size=config.model.block_size,
    )
    optim = config.optim
    decay_steps = optim.lr_decay_steps or max_steps
    floor = optim.learning_rate / 10 if optim.min_learning_rate is None else optim.min_learning_rate
    return {
        "model_config": fields,
        "weight_decay": optim.weight_decay,
        "learning_rate": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "optimizer": optim.optimizer,
        **get_optimizer(optim.optimizer).complete(config.optimizer_fields),
        "warmup_steps": min(100, decay_steps // 10) if optim.warmup_steps is None else optim.warmup_steps,
        "decay_steps": decay_steps,
        "final_lr_ratio": floor / optim.learning_rate,
        "compile": config.trainer.compile,
        "recompute": config.trainer.recompute,
        "loss": config.trainer.loss,
        "freeze_embeddings": config.run.freeze_embeddings,
    }
