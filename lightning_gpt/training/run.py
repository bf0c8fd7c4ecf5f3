"""Put a training run together: tokens, module, Trainer and callbacks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from difflib import get_close_matches
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_gpt.checkpoint import RUNS, Checkpoint, ExactResume, open_checkpoint, remember_run
from lightning_gpt.checkpoint.initial import InitialWeights, begin, fitted_vocabulary, open_source
from lightning_gpt.checkpoint.resume import require_resumable
from lightning_gpt.config import SIZES, TrainConfig, TrainerOptions, UserError
from lightning_gpt.data.loading import Source, TokenData
from lightning_gpt.data.tasks import find_task
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.data.tokens.token_files import is_token_folder
from lightning_gpt.implementations.registry import get_implementation, refused_by
from lightning_gpt.models import FORMS, GPTModule
from lightning_gpt.optim.registry import check_options, get_optimizer
from lightning_gpt.planning import flops_per_token
from lightning_gpt.sampling import encode_prompt
from lightning_gpt.strategies import StrategyRow, find_devices, get_strategy
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.strategies.saving import WholeFiles
from lightning_gpt.tokenizers import Tokenizer
from lightning_gpt.training.callbacks import (
    DropoutSeed,
    FinalSample,
    ProgressBar,
    RunMetrics,
    ValidateAtEnd,
    quiet_lightning,
)
from lightning_gpt.training.header import Budget, print_header, print_plan

DEFAULT_STEPS = 1000
DEFAULT_SAMPLE_TOKENS = 200
DEFAULT_PRESET = "gpt-micro"

LOGGERS: dict[str, Callable[[Path], Logger | bool]] = {
    "tensorboard": lambda run: TensorBoardLogger(run, name="logs"),
    "csv": lambda run: CSVLogger(run, name="logs"),
    "wandb": lambda run: WandbLogger(save_dir=run, name=run.name),
    "none": lambda run: False,
}


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> Path | None:
    """Train to the end of the budget, or print what the run would need (``--dry_run``).

    Args:
        config: The run.
        callbacks: Additional Lightning callbacks, called after the run's own.

    Returns:
        The run folder; None for a dry run.

    Raises:
        UserError: An option is wrong; raised before the first step.
    """
    quiet_lightning()
    run = config.run
    _check_trainer_options(config.trainer)
    where = find_devices(config.trainer, elsewhere=run.dry_run)
    accumulate = _accumulation(config, world_size=where.world_size)
    strategy = _strategy(config, where, accumulate=accumulate)
    _check_optimizer(config, strategy)
    # The checkpoint to start from, if any: the one to resume, or the one of --init_from.
    checkpoint = open_checkpoint(Path(run.resume), trust=run.trust_checkpoint) if run.resume else None
    weights = None
    if run.init_from and not checkpoint:
        weights = open_source(run.init_from, trust=run.trust_checkpoint, n_head=config.model_fields.get("n_head"))
    start = checkpoint or weights
    source = _source(config, start)
    vocab_size, padding = fitted_vocabulary(
        source, pad=config.model.pad_vocab, start=start, goes_on=checkpoint is not None
    )
    config = replace(config, model=replace(config.model, pad_vocab=config.model.pad_vocab or padding > 0))
    sample = _final_sample(config, source)
    data = TokenData(
        source,
        name=config.data.data,
        block_size=config.model.block_size,
        batch_size=config.data.batch_size,
        seed=run.seed,
        num_workers=config.data.num_workers,
        eval_batches=config.trainer.eval_batches,
    )
    budget = _budget(config, where, data, accumulate=accumulate)
    seed_everything(run.seed, verbose=False)
    arguments = _module_arguments(config, vocab_size=vocab_size, padding=padding, max_steps=budget.max_steps)
    if run.dry_run:
        module = GPTModule.without_memory(config.model.implementation, **arguments)
    else:
        module = FORMS[strategy.form](config.model.implementation, **arguments, **strategy.form_options)
    reason, fields = refused_by(module.model, device_type=where.device_type, dtype=where.dtype)
    if reason:
        raise UserError(f"{reason}; use {' '.join(f'--{name} {value}' for name, value in fields.items())}")
    if checkpoint:
        require_resumable(checkpoint, module, max_steps=budget.max_steps)
    loaded, start_up = begin(run, module, weights)
    if run.dry_run:
        print_header(module, source, budget, loaded=loaded, where=where, strategy=strategy.name)
        print_plan(module, budget, rules=strategy.memory, where=where, recompute=config.trainer.recompute)
        return None
    run_dir = Path(run.out_dir) if run.out_dir else _fresh_folder()
    metrics = RunMetrics(
        tokens_per_step=budget.tokens_per_step,
        flops_per_token=flops_per_token(module.model, block_size=config.model.block_size),
    )
    own = [ExactResume(checkpoint), *start_up, *_callbacks(config, run_dir, metrics, accumulate=accumulate), *sample]
    trainer = _trainer(config, strategy, where, run_dir, callbacks=[*own, *callbacks], budget=budget)
    if trainer.world_size != where.world_size:
        raise UserError(
            f"the launcher started {trainer.world_size} processes, and the flags say {where.world_size}; let --devices"
            " and --num_nodes agree with it"
        )
    _open_folder(run_dir, config)
    print_header(module, source, budget, loaded=loaded, where=where, strategy=type(trainer.strategy).__name__)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        print(f"checkpoints: {run_dir}/checkpoints\nnext: python sample.py --checkpoint {run_dir}")
    return run_dir


# The Trainer's options that lightning_gpt sets; --trainer.NAME sets the others.
_DECIDED = (
    "accelerator devices num_nodes strategy precision plugins logger callbacks max_epochs max_steps max_time"
    " accumulate_grad_batches gradient_clip_val val_check_interval check_val_every_n_epoch num_sanity_val_steps"
    " log_every_n_steps use_distributed_sampler enable_model_summary limit_train_batches limit_val_batches"
    " overfit_batches fast_dev_run"
).split()


def _check_trainer_options(options: TrainerOptions) -> None:
    known = set(signature(Trainer.__init__).parameters) - {"self"}
    for name in options.trainer:
        if name in _DECIDED:
            raise UserError(f"--trainer.{name} is set by lightning-gpt itself; see --help for the flag to use instead")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"--trainer.{name}: lightning.Trainer has no such option{hint}")


def _accumulation(config: TrainConfig, *, world_size: int) -> int:
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


def _strategy(config: TrainConfig, where: Devices, *, accumulate: int) -> StrategyRow:
    batch_size = config.data.batch_size
    decided = {
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": batch_size,
        "train_batch_size": batch_size * accumulate * where.world_size,
        "gradient_clipping": config.optim.gradient_clip_val,
    }
    return get_strategy(config.trainer, where=where, decided=decided)


def _check_optimizer(config: TrainConfig, strategy: StrategyRow) -> None:
    """Raise a UserError for options of other optimizers, and for an optimizer or clipping that the strategy lacks."""
    name, algorithm = config.optim.optimizer, config.trainer.trainer.get("gradient_clip_algorithm") or "norm"
    if strategy.deepspeed_engine:
        get_optimizer(name).require_deepspeed()
    check_options(name, config.optimizer_fields)
    if algorithm not in strategy.clip_algorithms:
        raise UserError(
            f"--trainer.gradient_clip_algorithm {algorithm} does not work under --strategy {config.trainer.strategy};"
            f" choose one of {', '.join(strategy.clip_algorithms)}"
        )


def _tokenizer(config: TrainConfig, start: Checkpoint | None) -> str | Tokenizer | None:
    """Choose the tokenizer: the checkpoint's, unless --tokenizer names another or --data is already tokenized.

    A resumed run keeps its tokenizer.
    """
    own, name, resumes = start.tokenizer if start else None, config.data.tokenizer, config.run.resume
    if own is not None and name is not None and not own.answers_to(name):
        if resumes:
            raise UserError(f"--tokenizer {name} differs from the run's tokenizer ({own.name}); leave it out")
        return name
    is_tokenized = config.data.data != "stdlib" and is_token_folder(Path(config.data.data).expanduser())
    return name if is_tokenized and not resumes else own or name


def _source(config: TrainConfig, start: Checkpoint | None) -> Source:
    """Return the source of samples: a task, or tokens."""
    task = find_task(config.data.data)
    if task:
        return task(**config.task_fields)
    return prepare(
        config.data.data,
        tokenizer=_tokenizer(config, start),
        tokenizer_file=config.data.tokenizer_file,
        block_size=config.model.block_size,
    )


def _final_sample(config: TrainConfig, source: Source) -> list[Callback]:
    """Return the callback that samples at the end, if any; raise a UserError now if the prompt cannot be encoded."""
    run = config.run
    if source.tokenizer is None or run.sample_tokens == 0:
        return []
    length, top_k = (source.answer_length, 1) if isinstance(source, Task) else (DEFAULT_SAMPLE_TOKENS, None)
    length = length if run.sample_tokens is None else run.sample_tokens
    encode_prompt(source.tokenizer, run.prompt)
    return [FinalSample(source.tokenizer, prompt=run.prompt, max_new_tokens=length, seed=run.seed, top_k=top_k)]


def _budget(config: TrainConfig, where: Devices, data: TokenData, *, accumulate: int) -> Budget:
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


def _module_arguments(config: TrainConfig, *, vocab_size: int, padding: int, max_steps: int) -> dict[str, Any]:
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
        "freeze_embeddings": config.run.freeze_embeddings,
    }


def _fresh_folder() -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, count = RUNS / stamp, 1
    while folder.exists():
        count += 1
        folder = RUNS / f"{stamp}-{count}"
    return folder


@rank_zero_only
def _open_folder(run_dir: Path, config: TrainConfig) -> None:
    """Create the run folder and save the configuration in it, without one-off flags."""
    flat = config.flat() | {"out_dir": str(run_dir), "resume": None, "trust_checkpoint": False, "tokenizer_file": None}
    try:
        run_dir.mkdir(parents=True, exist_ok=config.run.out_dir is not None)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(flat, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out_dir {run_dir} cannot be written: {error.strerror}; choose another") from error
    remember_run(run_dir)


def _callbacks(config: TrainConfig, run_dir: Path, metrics: RunMetrics, *, accumulate: int) -> list[Callback]:
    wanted = config.trainer.trainer.get("enable_progress_bar", True)
    bar = [ProgressBar(refresh_rate=10 * accumulate)] if wanted else []
    checkpoint = partial(
        ModelCheckpoint, dirpath=run_dir / "checkpoints", enable_version_counter=False, save_on_train_epoch_end=False
    )
    return [
        DropoutSeed(config.run.seed),
        ValidateAtEnd(),
        checkpoint(filename="best", monitor="val_loss"),
        checkpoint(filename="last"),
        *bar,
        metrics,  # after the bar, which must close before the last line is printed
    ]


def _trainer(
    config: TrainConfig,
    strategy: StrategyRow,
    where: Devices,
    run_dir: Path,
    *,
    callbacks: list[Callback],
    budget: Budget,
) -> Trainer:
    options, name = config.trainer, config.run.logger
    if name not in LOGGERS:
        raise UserError(f"--logger {name} is unknown; choose one of {', '.join(LOGGERS)}")
    try:
        logger = LOGGERS[name](run_dir)
    except ModuleNotFoundError as error:
        raise UserError(f"--logger {name} needs a package: {error}; pip install it or choose another") from error
    ours: dict[str, Any] = {
        **strategy.arguments(where),
        "plugins": [WholeFiles()],
        "logger": logger,
        "callbacks": callbacks,
        "max_epochs": -1,
        "max_steps": budget.max_steps,
        "accumulate_grad_batches": budget.accumulate,
        "gradient_clip_val": config.optim.gradient_clip_val or None,
        "val_check_interval": options.eval_interval * budget.accumulate,
        "check_val_every_n_epoch": None,
        # Score initial weights before the first step, so that the user sees where fine-tuning starts.
        "num_sanity_val_steps": -1 if any(isinstance(callback, InitialWeights) for callback in callbacks) else 0,
        "log_every_n_steps": options.log_every_n_steps,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
    assert ours.keys() <= set(_DECIDED)
    try:
        return Trainer(**ours, **options.trainer)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"lightning.Trainer rejects its options: {error}") from error
