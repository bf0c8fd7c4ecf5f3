"""Exact scores of a checkpoint."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning import Trainer

from lightning_gpt.callbacks import quiet_lightning
from lightning_gpt.checkpoint import find_checkpoint, load_checkpoint
from lightning_gpt.config import EvaluateOptions, TrainerOptions, UserError
from lightning_gpt.data.loading import TokenData
from lightning_gpt.data.preparation import prepare
from lightning_gpt.strategies import device_arguments


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        checkpoint: The file that was scored.
        step: Optimizer steps it was trained for.
        loss: Mean cross-entropy, nats per token.
        perplexity: exp(loss).
        bits_per_byte: Cross-entropy in bits over the text's UTF-8 bytes; None where the bytes are not known.
        tokens: Tokens scored.
    """

    checkpoint: str
    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def evaluate(options: EvaluateOptions) -> Score:
    """Scores a checkpoint on the validation split of its own text, or of another.

    Raises:
        UserError: Checkpoint or data are missing or do not fit each other.
    """
    if options.json and not Path(options.json).parent.is_dir():
        raise UserError(f"--json {options.json} cannot be written: its folder does not exist; make it first")
    quiet_lightning()
    path = find_checkpoint(options.checkpoint or "latest", which=options.which)
    checkpoint = load_checkpoint(path)
    module = checkpoint.module()
    data = options.data or checkpoint.data
    if data is None:
        raise UserError(f"{path} does not say what it was trained on; give --data")
    tokenizer = checkpoint.tokenizer
    block_size = checkpoint.model_config["block_size"]
    files = prepare(data, tokenizer=tokenizer.name if tokenizer else None, block_size=block_size)
    if tokenizer and files.tokenizer and files.tokenizer.to_dict() != tokenizer.to_dict():
        raise UserError(f"--data {data} has another vocabulary than {path} was trained with; give the same text")
    source = TokenData(
        files, name=data, block_size=block_size, batch_size=options.batch_size, eval_batches=options.eval_batches
    )
    where = device_arguments(TrainerOptions(accelerator=options.accelerator, devices=1))
    trainer = Trainer(
        **where, logger=False, enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loss = trainer.validate(module, source, verbose=False)[0]["val_loss"]
    tokens = files.val_tokens - 1
    if options.eval_batches:
        tokens = min(tokens, options.eval_batches * options.batch_size * block_size)
    whole = tokens == files.val_tokens - 1 and files.val_bytes
    score = Score(
        checkpoint=str(path),
        step=checkpoint.step,
        loss=loss,
        perplexity=math.exp(loss),
        # The first token is context only; its bytes are counted, which a text of any length does not show.
        bits_per_byte=loss * tokens / math.log(2) / files.val_bytes if whole and files.val_bytes else None,
        tokens=tokens,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(score), indent=2) + "\n", encoding="utf-8")
    return score
