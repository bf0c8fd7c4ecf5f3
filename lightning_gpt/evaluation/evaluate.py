"""Score checkpoints exactly, and write them in other forms."""

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.atomic import require_writable
from lightning_gpt.charts import require_chart, save_chart
from lightning_gpt.checkpoint import (
    Checkpoint,
    canonical_folder,
    convert,
    ensure_canonical,
    find_checkpoint,
    open_checkpoint,
)
from lightning_gpt.checkpoint.initial import fitted_vocabulary
from lightning_gpt.checkpoint.resume import restore_weights
from lightning_gpt.checkpoint.write.canonical import one_at_a_time
from lightning_gpt.checkpoint.write.export import FORMATS, export
from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.config.commands import EvaluateOptions
from lightning_gpt.data.loading import Source, TokenData
from lightning_gpt.data.tasks import find_task, is_own_task
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.data.tokens.token_files import TokenFiles, is_token_folder
from lightning_gpt.evaluation.chart import draw
from lightning_gpt.evaluation.lm_eval import TokenScorer, adapter, harness
from lightning_gpt.evaluation.report import HarnessScore, Report, Score
from lightning_gpt.models import FORMS, GPTModule
from lightning_gpt.progress import PATIENCE, Progress
from lightning_gpt.strategies import StrategyRow, find_devices, get_strategy
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.training.callbacks import quiet_lightning
from lightning_gpt.trust import require_honoured

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class _Job:
    """A checkpoint and the data to score it on, which are known to fit each other.

    Attributes:
        checkpoint: The checkpoint.
        files: The token files, or the task.
        name: Name of the data.
        block_size: Context length in tokens.
        stride: Tokens from one window to the next; None for a task.
    """

    checkpoint: Checkpoint
    files: Source
    name: str
    block_size: int
    stride: int | None


def rewrite(options: EvaluateOptions) -> Path | None:
    """Write a checkpoint in another form: the canonical one beside it, or an export to ``--out``.

    Returns:
        The written folder; None on ranks other than the first, which do nothing.

    Raises:
        UserError: The flags contradict each other, there is no such checkpoint, it does not fit its model or the form,
            or the folder cannot be written.
    """
    if (options.export is None) != (options.out is None):
        raise UserError("--export FORMAT needs --out DIR, and --out DIR needs --export FORMAT; give both")
    if options.export is not None and options.convert_only:
        raise UserError("--export and --convert_only write different things; give one of them")
    if options.export is not None and options.export not in FORMATS:
        raise UserError(f"--export {options.export} is unknown; choose one of {', '.join(FORMATS)}")
    if str(options.convert_only).lower() not in ("false", "true", "pt"):
        raise UserError(f"--convert_only {options.convert_only} is unknown; give it alone, or as --convert_only pt")
    if options.plot:
        raise UserError(
            f"--plot {options.plot} draws scores, which --convert_only and --export do not compute; leave it out"
        )
    names = _checkpoint_names(options)
    if len(names) > 1:
        raise UserError(f"--convert_only and --export write one checkpoint; give one of {', '.join(names)}")
    if getattr(rank_zero_only, "rank", 0):
        return None
    path = find_checkpoint(names[0], which=options.which)
    checkpoint = open_checkpoint(path, trust=options.trust_checkpoint, verify=options.verify)
    checkpoint.require_fit(GPTModule.without_memory(checkpoint.implementation, model_config=checkpoint.model_config))
    with one_at_a_time(path):
        if options.export and options.out:
            return export(checkpoint, Path(options.out), form=options.export)
        pt = str(options.convert_only).lower() == "pt"
        return convert(checkpoint, canonical_folder(path), optimizer=checkpoint.has_optimizer, pt=pt)


def evaluate(options: EvaluateOptions) -> Report | None:
    """Score checkpoints on the validation split of their own data, or of ``--data``, under any strategy.

    Returns:
        The scores; None on ranks other than the first.

    Raises:
        UserError: A checkpoint or its data is missing, or they do not fit each other.
    """
    require_writable(options.json)
    if options.plot:
        require_chart(options.plot)
    quiet_lightning()
    where = TrainerOptions(
        strategy=options.strategy,
        deepspeed_config=options.deepspeed_config,
        accelerator=options.accelerator,
        devices="auto" if options.gpus else options.devices,
        gpus=options.gpus,
        num_nodes=options.num_nodes,
        precision=options.precision,
    )
    devices = find_devices(where)
    row = get_strategy(where, where=devices)
    if options.lm_eval or options.lm_eval_include:
        _require_for_harness(options, devices)
    checkpoints = [_open(path, options) for path in _checkpoint_names(options)]
    for checkpoint in checkpoints:
        checkpoint.compute_on(devices.device_type, devices.dtype)
    if options.lm_eval:
        report = Report([_harness_score(checkpoint, options, devices) for checkpoint in checkpoints])
    else:
        jobs = [_job(checkpoint, options) for checkpoint in checkpoints]  # report errors before scoring the first one
        names = ["score" if len(jobs) == 1 else f"score {n} of {len(jobs)}" for n in range(1, len(jobs) + 1)]
        scores = [
            _validate(job, options, row=row, devices=devices, what=what) for job, what in zip(jobs, names, strict=True)
        ]
        report = Report([score for score in scores if score], _notes(jobs, scores))
    if not report.scores:
        return None
    if options.json:
        report.save(Path(options.json))
    if options.plot:
        save_chart(draw(report), Path(options.plot))
    return report


def _checkpoint_names(options: EvaluateOptions) -> list[str]:
    names = options.checkpoint or "latest"
    return [names] if isinstance(names, str) else names


def _open(name: str, options: EvaluateOptions) -> Checkpoint:
    """Open a checkpoint in a form that is fast to read, and apply a larger ``--block_size``."""
    path = find_checkpoint(name, which=options.which)
    checkpoint = ensure_canonical(path, trust=options.trust_checkpoint, verify=options.verify)
    if options.block_size and options.block_size > checkpoint.model_config["block_size"]:
        checkpoint.extend_context(options.block_size)
    return checkpoint


def _validate(job: _Job, options: EvaluateOptions, *, row: StrategyRow, devices: Devices, what: str) -> Score | None:
    """Score one checkpoint, and show the progress as `what`; return None on ranks other than the first."""
    checkpoint = job.checkpoint
    checkpoint.require_fit(GPTModule.without_memory(checkpoint.implementation, model_config=checkpoint.model_config))
    module = FORMS[row.form](checkpoint.implementation, model_config=checkpoint.model_config, **row.form_options)
    source = TokenData(
        job.files,
        name=job.name,
        block_size=job.block_size,
        batch_size=options.batch_size,
        eval_batches=options.eval_batches,
        stride=job.stride,
    )
    # In a SLURM job Lightning loads hpc_ckpt_*.ckpt from its root folder, by default the working directory.
    with tempfile.TemporaryDirectory() as empty:
        trainer = Trainer(
            **row.arguments(devices),
            default_root_dir=empty,
            logger=False,
            callbacks=[_LoadWeights(checkpoint), _ShowProgress(what)],
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        metrics = trainer.validate(module, source, verbose=False)[0]
    return _score(metrics, module.val_tokens, job) if trainer.is_global_zero else None


def _require_for_harness(options: EvaluateOptions, devices: Devices) -> None:
    if not options.lm_eval:
        raise UserError(f"--lm_eval_include {options.lm_eval_include} needs --lm_eval with the names of the tasks")
    for name in ("data", "stride", "eval_batches"):
        if value := getattr(options, name):
            raise UserError(
                f"--{name} {value} is for the validation split, which --lm_eval does not score; give one of them"
            )
    if devices.world_size > 1 or options.strategy != EvaluateOptions.strategy:
        raise UserError("--lm_eval runs in one process on one device; leave --strategy and --devices out")


def _harness_score(checkpoint: Checkpoint, options: EvaluateOptions, devices: Devices) -> HarnessScore:
    """Score one checkpoint with lm-eval."""
    assert options.lm_eval is not None
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise UserError(f"{checkpoint.path} does not record its tokenizer, which --lm_eval needs")
    config = checkpoint.model_config
    block_size = options.block_size or config["block_size"]

    def model() -> Any:
        precision: Any = devices.precision
        fabric = Fabric(accelerator=devices.accelerator, devices=devices.devices, precision=precision)
        scorer = TokenScorer(
            fabric.setup_module(checkpoint.module().model.eval()),
            block_size=block_size,
            batch_size=options.batch_size,
            device=fabric.device,
            vocab_size=config["vocab_size"] - config.get("vocab_padding", 0),
        )
        return adapter(scorer, tokenizer)

    version, tasks = harness(model, tasks=options.lm_eval, include=options.lm_eval_include)
    return HarnessScore(
        checkpoint=str(checkpoint.path),
        hash=checkpoint.hash(),
        step=checkpoint.step,
        block_size=block_size,
        lm_eval=version,
        tasks=tasks,
    )


class _LoadWeights(Callback):
    """Load the weights after the strategy has placed the model; each rank loads its share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        restore_weights(pl_module.model, self.checkpoint)


class _ShowProgress(Callback):
    """Show how many batches are scored, on the first rank."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._progress: Progress | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            total = int(sum(trainer.num_val_batches))
            self._progress = Progress(self.what, total=total, unit="batches", delay=PATIENCE)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.done + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._progress.close()

    def on_exception(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.close()


def _job(checkpoint: Checkpoint, options: EvaluateOptions) -> _Job:
    """Choose the data and windows on which to score a checkpoint, and check that they fit it."""
    data = options.data or checkpoint.data
    if data is None:
        raise UserError(f"{checkpoint.path} does not record its training data; give --data")
    tokenizer = checkpoint.tokenizer
    block_size = options.block_size or checkpoint.model_config["block_size"]
    stride = options.stride or block_size
    if stride > block_size:
        raise UserError(f"--stride {stride} would skip tokens; give at most the block_size, {block_size}")
    if not options.data and is_own_task(data):
        require_honoured(data, flag="data", source=checkpoint.path, trust=checkpoint.trusted, typed=())
    task = find_task(data)
    if task:
        for name, value in (("block_size", options.block_size), ("stride", options.stride)):
            if value is not None:
                raise UserError(
                    f"--{name} {value} is for text, and --data {data} is a task with rows of its own; leave it out"
                )
        try:
            rows = task(**(checkpoint.task_fields if data == checkpoint.data else {}))
        except TypeError as error:
            raise UserError(f"{checkpoint.path} does not describe a task of --data {data}: {error}") from error
        if rows.block_size != block_size:
            raise UserError(
                f"--data {data} has rows of {rows.block_size} inputs, not the {block_size} of {checkpoint.path};"
                " leave it out"
            )
        files: Source = rows
    elif tokenizer is None and not is_token_folder(Path(data).expanduser()):
        raise UserError(f"{checkpoint.path} does not record its tokenizer; give --data a folder of its tokens")
    else:
        files = prepare(data, tokenizer=tokenizer, block_size=block_size)
    fitted_vocabulary(files, pad=False, start=checkpoint, goes_on=True)
    return _Job(checkpoint, files, data, block_size, None if task else stride)


def _score(metrics: Mapping[str, float], tokens: int, job: _Job) -> Score:
    loss, files = metrics["val_loss"], job.files
    val_bytes = files.n_bytes("val") if isinstance(files, TokenFiles) and tokens == files.val_tokens - 1 else None
    return Score(
        checkpoint=str(job.checkpoint.path),
        hash=job.checkpoint.hash(),
        step=job.checkpoint.step,
        loss=loss,
        perplexity=math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        # The first token is not scored, but its bytes are counted; the difference is negligible.
        bits_per_byte=loss * tokens / math.log(2) / val_bytes if val_bytes else None,
        tokens=tokens,
        data=job.name,
        block_size=job.block_size,
        stride=job.stride or job.block_size,
        accuracy=metrics.get("val_accuracy"),
    )


def _notes(jobs: Sequence[_Job], scores: Sequence[Score | None]) -> list[str]:
    """Return the reasons why the scores of several checkpoints are not comparable."""

    def differ(values: Iterable[Any]) -> bool:
        return len(set(values)) > 1

    notes = []
    known = (job.files.tokenizer for job in jobs)
    if differ(json.dumps(tokenizer.to_dict(), sort_keys=True) if tokenizer else None for tokenizer in known):
        notes.append("loss and perplexity are per token, and the tokenizers differ: compare only bits_per_byte")
    elif differ(score.tokens for score in scores if score):
        notes.append("the numbers of scored tokens differ")
    if differ(job.name for job in jobs):
        notes.append("each was scored on its own run's data; --data TEXT scores all on the same text")
    if differ((job.block_size, job.stride) for job in jobs):
        notes.append("the context lengths differ, and a longer context lowers the loss")
    return notes
