"""Exact scores of a checkpoint, and its other forms."""

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.callbacks import quiet_lightning
from lightning_gpt.checkpoint import (
    Checkpoint,
    canonical_folder,
    convert,
    ensure_canonical,
    find_checkpoint,
    open_checkpoint,
)
from lightning_gpt.checkpoint.canonical import one_at_a_time
from lightning_gpt.checkpoint.export import FORMATS, export
from lightning_gpt.checkpoint.initial import fitted_vocabulary
from lightning_gpt.checkpoint.resume import restore_weights
from lightning_gpt.config import EvaluateOptions, TrainerOptions, UserError
from lightning_gpt.data.loading import Source, TokenData
from lightning_gpt.data.preparation import prepare
from lightning_gpt.data.tasks import find_task
from lightning_gpt.data.token_files import TokenFiles, is_token_folder
from lightning_gpt.models import FORMS
from lightning_gpt.strategies import find_devices, get_strategy

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        checkpoint: What was scored.
        hash: A sha256 of its weights, the same in every form of a checkpoint.
        step: Optimizer steps it was trained for.
        loss: Mean cross-entropy, nats per token.
        perplexity: exp(loss); infinite, and null in JSON, where that is beyond a float.
        bits_per_byte: Cross-entropy in bits over the text's UTF-8 bytes; None where the bytes are not known.
        tokens: Tokens scored.
        accuracy: The share of answers that greedy generation gets right as a whole; None where the data is no task.
    """

    checkpoint: str
    hash: str
    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    accuracy: float | None = None

    def found(self) -> dict[str, Any]:
        """The numbers by name, without those that the data has no use for."""
        return {k: v for k, v in asdict(self).items() if k != "accuracy" or v is not None}


def rewrite(options: EvaluateOptions) -> Path | None:
    """Writes a checkpoint in another form: the canonical one beside it, or another program's into ``--out``.

    Returns:
        The folder; None on ranks other than the first, which do nothing.

    Raises:
        UserError: The flags do not go together, there is no such checkpoint, it does not fit its model or the form, or
            the folder cannot be written.
    """
    if (options.export is None) != (options.out is None):
        raise UserError("--export FORMAT and --out DIR say what is written and where to; give both")
    if options.export is not None and options.convert_only:
        raise UserError("--export and --convert_only write different things; give one of them")
    if options.export is not None and options.export not in FORMATS:
        raise UserError(f"--export {options.export} is unknown; choose one of {', '.join(FORMATS)}")
    if str(options.convert_only).lower() not in ("false", "true", "pt"):
        raise UserError(f"--convert_only {options.convert_only} is unknown; give it alone, or as --convert_only pt")
    if rank_zero_only.rank:
        return None
    path = find_checkpoint(options.checkpoint or "latest", which=options.which)
    checkpoint = open_checkpoint(path, trust=options.trust_checkpoint)
    _require_own_fit(checkpoint)
    with one_at_a_time(path):
        if options.export and options.out:
            return export(checkpoint, Path(options.out), form=options.export)
        pt = str(options.convert_only).lower() == "pt"
        return convert(checkpoint, canonical_folder(path), optimizer=checkpoint.has_optimizer, pt=pt)


def evaluate(options: EvaluateOptions) -> Score | None:
    """Scores a checkpoint on the validation split of its own text, or of another, under any strategy.

    Returns:
        The score; None on ranks other than the first.

    Raises:
        UserError: Checkpoint or data are missing or do not fit each other.
    """
    if options.json:
        _require_writable(Path(options.json))
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
    arguments = row.arguments(devices)
    path = find_checkpoint(options.checkpoint or "latest", which=options.which)
    checkpoint = ensure_canonical(path, trust=options.trust_checkpoint)
    module = FORMS[row.form](checkpoint.implementation, model_config=checkpoint.model_config, **row.form_options)
    checkpoint.require_fit(module)
    files, name = _held_out(checkpoint, options)
    source = TokenData(
        files,
        name=name,
        block_size=checkpoint.model_config["block_size"],
        batch_size=options.batch_size,
        eval_batches=options.eval_batches,
    )
    trainer = Trainer(
        **arguments,
        logger=False,
        callbacks=[_Weights(checkpoint)],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    found = trainer.validate(module, source, verbose=False)[0]
    if not trainer.is_global_zero:
        return None
    score = _score(found, module.val_tokens, checkpoint, files)
    if options.json:
        _write_json(score, Path(options.json))
    return score


class _Weights(Callback):
    """Fills the model when the strategy has put it where it lives, each rank with its share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore_weights(pl_module.model, self.checkpoint)


def _require_writable(file: Path) -> None:
    """Finds out before the work whether a file can be written, and leaves no trace."""
    if not file.parent.is_dir():
        raise UserError(f"--json {file} cannot be written: its folder does not exist; make it first")
    try:
        if file.exists():
            file.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}; choose another") from error


def _write_json(score: Score, file: Path) -> None:
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in score.found().items()}
    text = json.dumps(known, indent=2)  # JSON has no word for infinity
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # a full disk, say: the numbers are told all the same
        raise UserError(f"--json {file} cannot be written: {error.strerror}; it was to say {text}") from error


def _require_own_fit(checkpoint: Checkpoint) -> None:
    module = FORMS["fsdp"](checkpoint.implementation, model_config=checkpoint.model_config)  # takes no memory
    checkpoint.require_fit(module)


def _held_out(checkpoint: Checkpoint, options: EvaluateOptions) -> tuple[Source, str]:
    """What to score, and what it is called."""
    data = options.data or checkpoint.data
    if data is None:
        raise UserError(f"{checkpoint.path} does not say what it was trained on; give --data")
    tokenizer = checkpoint.tokenizer
    block_size = checkpoint.model_config["block_size"]
    task = find_task(data)
    if task:
        files: Source = task(**(checkpoint.task_fields if data == checkpoint.data else {}))
        if files.block_size != block_size:
            raise UserError(
                f"--data {data} has rows of {files.block_size} inputs, not the {block_size} of {checkpoint.path};"
                " leave it out"
            )
    elif tokenizer is None and not is_token_folder(Path(data).expanduser()):
        raise UserError(f"{checkpoint.path} does not know its tokenizer; give --data a folder of its tokens")
    else:
        files = prepare(data, tokenizer=tokenizer, block_size=block_size)
    fitted_vocabulary(files, pad=False, start=checkpoint, goes_on=True)
    return files, data


def _score(found: Mapping[str, float], tokens: int, checkpoint: Checkpoint, files: Source) -> Score:
    loss = found["val_loss"]
    val_bytes = files.val_bytes if isinstance(files, TokenFiles) and tokens == files.val_tokens - 1 else None
    return Score(
        checkpoint=str(checkpoint.path),
        hash=checkpoint.hash(),
        step=checkpoint.step,
        loss=loss,
        perplexity=math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        # The first token is context only; its bytes are counted, which a text of any length does not show.
        bits_per_byte=loss * tokens / math.log(2) / val_bytes if val_bytes else None,
        tokens=tokens,
        accuracy=found.get("val_accuracy"),
    )
