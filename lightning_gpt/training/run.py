"""Put a training run together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything

from lightning_gpt.checkpoint import Checkpoint, ExactResume, open_checkpoint
from lightning_gpt.checkpoint.header import require_plausible
from lightning_gpt.checkpoint.initial import begin, fitted_vocabulary, open_source
from lightning_gpt.checkpoint.resume import require_resumable
from lightning_gpt.checksums import verify_checksums
from lightning_gpt.config import TrainConfig, UserError
from lightning_gpt.data.loading import Source, TokenData
from lightning_gpt.data.tasks import find_task
from lightning_gpt.data.tasks.base import Task
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.data.tokens.token_files import is_token_folder
from lightning_gpt.implementations.registry import refused_by
from lightning_gpt.invocation import command_line
from lightning_gpt.models import FORMS, GPTModule
from lightning_gpt.planning import flops_per_token
from lightning_gpt.sampling import encode_prompt
from lightning_gpt.strategies import StrategyRow, get_strategy
from lightning_gpt.strategies.devices import Devices, set_tf32
from lightning_gpt.tokenizers import Tokenizer
from lightning_gpt.training.averaging import Average, averaged
from lightning_gpt.training.branching import branched, require_stable
from lightning_gpt.training.budget import (
    Budget,
    accumulation,
    describe_schedule,
    make_budget,
    module_arguments,
    resolve,
)
from lightning_gpt.training.callbacks import FinalSample, RunMetrics, quiet_lightning
from lightning_gpt.training.determinism import check_determinism, deterministic
from lightning_gpt.training.dry_run import devices_of, print_plans
from lightning_gpt.training.folder import SameFolder, fresh_folder, open_folder
from lightning_gpt.training.header import describe_resumed, print_finished, print_header
from lightning_gpt.training.health import stopping_on_bad_numbers
from lightning_gpt.training.record import make_record, summary_facts
from lightning_gpt.training.samples import LoggedSamples
from lightning_gpt.training.stopping import Stopping, duration, stopping_safely
from lightning_gpt.training.summary import Summary
from lightning_gpt.training.trainer import check_optimizer, check_trainer_options, make_callbacks, make_trainer
from lightning_gpt.training.watchdog import Watchdog

DEFAULT_SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 200  # nanoGPT's, which make an early model's text readable


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> Path | None:
    """Train to the end of the budget, or print what the run would need (``--dry_run``).

    SIGHUP, SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 stop the run at the end of its step, after a checkpoint is saved.

    Args:
        config: The run.
        callbacks: Additional Lightning callbacks, called after the run's own.

    Returns:
        The run folder; None for a dry run.

    Raises:
        UserError: An option is wrong; raised before the first step.
        SystemExit: A signal has stopped the run; the code is one of ``training.watchdog.EXIT_CODES``.
    """
    limit = config.trainer.max_time
    with Watchdog(max_seconds=None if limit is None else duration(limit)) as watch:
        return _train(config, watch, callbacks)


def _train(config: TrainConfig, watch: Watchdog, callbacks: Sequence[Callback]) -> Path | None:
    quiet_lightning()
    run = config.run
    check_trainer_options(config.trainer)
    check_determinism(config.trainer)
    config, where, machine = devices_of(config)
    accumulate = accumulation(config, world_size=where.world_size)
    strategy = _strategy(config, where, accumulate=accumulate)
    check_optimizer(config, strategy)
    strategy = averaged(config, strategy, where)
    checkpoint = _resumed(config) if run.resume else None
    if checkpoint and run.decay_from:
        config = branched(config, checkpoint)
    given = config.flat()
    weights = _initial(config) if run.init_from and not checkpoint else None
    start = checkpoint or weights
    source = _source(config, start)
    vocab_size, padding = fitted_vocabulary(
        source, pad=config.model.pad_vocab, start=start, goes_on=checkpoint is not None
    )
    config = replace(config, model=replace(config.model, pad_vocab=config.model.pad_vocab or padding > 0))
    config = _resolve_tokens(config, source, start)
    sample = _final_sample(config, source)
    if run.log_samples and not sample:
        lacking = "the data does not record its tokenizer" if run.sample_tokens != 0 else "--sample_tokens is 0"
        raise UserError(f"--log_samples {run.log_samples} has nothing to write: {lacking}")
    data = _data(config, source)
    budget = make_budget(config, where, data, accumulate=accumulate)
    if checkpoint and config.resumed and config.resumed.automatic and checkpoint.step >= budget.max_steps:
        print_finished(checkpoint, budget)
        return Path(run.out_dir) if run.out_dir else None
    seed_everything(run.seed, verbose=False)
    set_tf32(where, allowed=config.trainer.tf32)
    config = resolve(config, budget, precision=where.precision)
    arguments = module_arguments(config, vocab_size=vocab_size, padding=padding)
    module = _module(config, arguments, checkpoint=checkpoint, strategy=strategy, where=where)
    if checkpoint:
        require_resumable(checkpoint, module, max_steps=budget.max_steps)
        if run.decay_from:
            require_stable(config, checkpoint, cooldown_steps=arguments["cooldown_steps"])
    loaded, start_up = begin(run, module, weights)
    described = {
        "strategy": strategy.describe(world_size=where.world_size),
        "schedule": describe_schedule(config.optim, cooldown_steps=arguments["cooldown_steps"]),
    }
    if run.dry_run:
        print_header(module, source, budget, loaded=loaded, where=where, **described)
        print_plans(config, module, budget, strategy=strategy, where=where, machine=machine)
        return None
    folder = SameFolder(Path(run.out_dir) if run.out_dir else fresh_folder(), resume=run.resume)
    average = [Average(config.optim.ema, resumed=checkpoint)] if config.optim.ema else []
    own = [folder, Stopping(watch), ExactResume(checkpoint), *start_up, *average]
    record = make_record(
        config,
        given=given,
        step=checkpoint.step if checkpoint else 0,
        facts=_facts(where, source, vocab_size=vocab_size),
        packages=("torch", "lightning", *(("deepspeed",) if strategy.deepspeed_engine else ())),
    )
    if checkpoint:
        loaded = describe_resumed(
            checkpoint, folder.run_dir, record=record, resumed=config.resumed, branches=bool(run.decay_from)
        )
    metrics = RunMetrics(
        tokens_per_step=budget.tokens_per_step,
        flops_per_token=flops_per_token(module.model, block_size=config.model.block_size),
    )
    summary = Summary(
        folder.run_dir,
        facts=summary_facts(config, module, budget, where, run_dir=folder.run_dir, record=record),
        metrics=metrics,
        source=checkpoint.path if checkpoint else None,
        step=checkpoint.step if checkpoint else 0,
        draws=run.logger != "none",
    )
    run_callbacks = make_callbacks(config, folder.run_dir, metrics, summary, resumed=checkpoint)
    if run.log_samples:
        run_callbacks.append(LoggedSamples(sample[0], every=run.log_samples, run_dir=folder.run_dir))
    every = [*own, *run_callbacks, *sample, *callbacks]
    at = checkpoint.step if checkpoint else None
    trainer = _trainer(config, strategy, where, budget, run_dir=folder.run_dir, callbacks=every, step=at)
    with open_folder(folder.run_dir, run, record=record, sources=[weights.path] if weights else []):
        print_header(module, source, budget, loaded=loaded, where=where, **described)
        with deterministic(config.trainer), stopping_safely(trainer, watch, folder.run_dir):
            with stopping_on_bad_numbers(trainer, folder.run_dir):
                settings = config.flat()
                for logger in trainer.loggers:
                    logger.log_hyperparams(settings)
                trainer.fit(module, data)
    if trainer.is_global_zero:
        print(f"checkpoints: {folder.run_dir}/checkpoints")
        print(f"next: {command_line('sample', f'--checkpoint {folder.run_dir}')}")
    return folder.run_dir


def _resumed(config: TrainConfig) -> Checkpoint:
    """Open the checkpoint to resume, which the parser of the command line has verified, if there was one."""
    run = config.run
    assert run.resume is not None
    if config.resumed is None:
        verify_checksums(Path(run.resume))
    return open_checkpoint(Path(run.resume), trust=run.trust_checkpoint, typed=[config.model.implementation])


def _initial(config: TrainConfig) -> Checkpoint:
    """Open the weights of ``--init_from``."""
    run = config.run
    assert run.init_from is not None
    n_head = config.model_fields.get("n_head")
    typed = [config.model.implementation]
    return open_source(run.init_from, trust=run.trust_checkpoint, n_head=n_head, typed=typed, verify=run.verify)


def _data(config: TrainConfig, source: Source) -> TokenData:
    return TokenData(
        source,
        name=config.data.data,
        block_size=config.model.block_size,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        eval_batches=config.trainer.eval_batches,
    )


def _module(
    config: TrainConfig,
    arguments: dict[str, Any],
    *,
    checkpoint: Checkpoint | None,
    strategy: StrategyRow,
    where: Devices,
) -> GPTModule:
    """Return the module in the strategy's form; in a dry run, on the meta device.

    Raises:
        UserError: The model does not fit the checkpoint or the devices.
    """
    name = config.model.implementation
    if checkpoint:  # compare sizes before anything is built
        fields = arguments["model_config"]
        require_plausible(checkpoint.stored, implementation=name, fields=fields, path=checkpoint.path)
    if config.run.dry_run:
        module = GPTModule.without_memory(name, **arguments)
    else:
        module = FORMS[strategy.form](name, **arguments, **strategy.form_options)
    reason, fields = refused_by(module.model, device_type=where.device_type, dtype=where.dtype)
    if reason:
        raise UserError(f"{reason}; use {' '.join(f'--{name} {value}' for name, value in fields.items())}")
    return module


def _trainer(
    config: TrainConfig,
    strategy: StrategyRow,
    where: Devices,
    budget: Budget,
    *,
    run_dir: Path,
    callbacks: list[Callback],
    step: int | None,
) -> Trainer:
    """Return the Trainer, as ``make_trainer`` does.

    Raises:
        UserError: The Trainer rejects an option, or the launcher has started another number of processes.
    """
    trainer = make_trainer(config, strategy, where, run_dir, callbacks=callbacks, budget=budget, step=step)
    if trainer.world_size != where.world_size:
        raise UserError(
            f"the launcher started {trainer.world_size} processes, and the flags say {where.world_size}; let --devices"
            " and --num_nodes agree with it"
        )
    return trainer


def _strategy(config: TrainConfig, where: Devices, *, accumulate: int) -> StrategyRow:
    batch_size = config.data.batch_size
    decided = {
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": batch_size,
        "train_batch_size": batch_size * accumulate * where.world_size,
        "gradient_clipping": config.optim.gradient_clip_val,
    }
    return get_strategy(config.trainer, where=where, decided=decided)


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


def _resolve_tokens(config: TrainConfig, source: Source, start: Checkpoint | None) -> TrainConfig:
    """Fill in the length of the final sample, and the tokenizer of a text if nothing else determines it."""
    length = source.answer_length if isinstance(source, Task) else DEFAULT_SAMPLE_TOKENS
    is_text = not isinstance(source, Task) and not is_token_folder(Path(config.data.data).expanduser())
    default = source.tokenizer.name if source.tokenizer and is_text and start is None else None
    if config.resumed:
        default = config.resumed.saved.get("tokenizer")
    return replace(
        config,
        data=replace(config.data, tokenizer=config.data.tokenizer or default),
        run=replace(config.run, sample_tokens=length if config.run.sample_tokens is None else config.run.sample_tokens),
    )


def _final_sample(config: TrainConfig, source: Source) -> list[FinalSample]:
    """Return the callback that samples at the end, if any; raise a UserError now if the prompt cannot be encoded."""
    run = config.run
    if source.tokenizer is None or not run.sample_tokens:
        return []
    encode_prompt(source.tokenizer, run.prompt)
    return [
        FinalSample(
            source.tokenizer,
            prompt=run.prompt,
            max_new_tokens=run.sample_tokens,
            seed=run.seed,
            temperature=SAMPLE_TEMPERATURE,
            top_k=1 if isinstance(source, Task) else SAMPLE_TOP_K,
        )
    ]


def _facts(where: Devices, source: Source, *, vocab_size: int) -> dict[str, Any]:
    """Return what the run found out, for the record."""
    device = torch.cuda.get_device_name() if where.device_type == "cuda" else where.device_type
    return {
        "devices": f"{where.world_size} x {device}",
        "data": source.describe(),
        "tokenizer": source.tokenizer.name if source.tokenizer else None,
        "vocab_size": vocab_size,
    }
