"""Start a new run from trained weights: derive options from them, and load them into the model."""

from collections.abc import Collection
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.adapted import AdaptedCheckpoint, fields_for, with_rows
from lightning_gpt.checkpoint.base import Checkpoint
from lightning_gpt.checkpoint.embeddings import read_embeddings
from lightning_gpt.checkpoint.resume import restore_weights, write_weight
from lightning_gpt.config import RunOptions, UserError
from lightning_gpt.data.loading import Source
from lightning_gpt.implementations.registry import Implementation, token_embedding_name
from lightning_gpt.implementations.sharding import full_shape
from lightning_gpt.models import GPTModule

_MULTIPLE = 64


def open_source(
    path: str, *, trust: bool, n_head: int | None, typed: Collection[str], verify: bool = False
) -> Checkpoint:
    """Open the checkpoint that ``--init_from`` names.

    Args:
        path: As for ``find_checkpoint``.
        trust: As for ``open_checkpoint``.
        n_head: As for ``open_checkpoint``.
        typed: As for ``open_checkpoint``.
        verify: As for ``open_checkpoint``.

    Raises:
        UserError: It cannot be found or opened.
    """
    found = find_checkpoint(path, which="best")
    return open_checkpoint(found, trust=trust, n_head=n_head, typed=typed, verify=verify)


def defaults_from(source: Checkpoint, row: Implementation) -> dict[str, Any]:
    """Return the default options of a run that starts from trained weights.

    Raises:
        UserError: The implementation cannot hold the weights.
    """
    fields = fields_for(row, source)
    del fields["vocab_size"]
    return {"implementation": row.name, "pad_vocab": fields.pop("vocab_padding", 0) > 0} | fields


def fitted_vocabulary(files: Source, *, pad: bool, start: Checkpoint | None, goes_on: bool) -> tuple[int, int]:
    """Return the model's vocabulary size, and how many of its rows are padding.

    Args:
        files: The data.
        pad: Whether to pad the vocabulary.
        start: The checkpoint that the run starts from or resumes.
        goes_on: Whether the model must keep the vocabulary of ``start``, as when a run is resumed.

    Raises:
        UserError: The weights were trained with another vocabulary or tokenizer.
    """
    tokens = files.vocab_size
    padded = -(-tokens // _MULTIPLE) * _MULTIPLE
    if start is None:
        return (padded, padded - tokens) if pad else (tokens, 0)
    theirs, ours = start.tokenizer, files.tokenizer
    if theirs and ours and theirs.name == ours.name and theirs.to_dict() != ours.to_dict():
        raise UserError(f"{start.path} and --data have different {ours.name} tokenizers; give --data the text")
    rows, padding = start.model_config["vocab_size"], start.model_config.get("vocab_padding", 0)
    if rows - padding == tokens and goes_on:
        if pad and not padding and rows != padded:
            raise UserError(f"--pad_vocab cannot be changed: {start.path} was trained with a vocabulary of {rows}")
        return rows, padding
    if rows - padding == tokens:
        return (padded, padded - tokens) if pad else (tokens, 0)
    if not padding and rows == padded:  # nanoGPT pads the vocabulary like this and does not record it
        return rows, rows - tokens
    raise UserError(
        f"{start.path} has a vocabulary of {rows - padding}, and --data one of {tokens}; give the data and --tokenizer"
        " that fit the weights"
    )


class InitialWeights(Callback):
    """Load initial weights after the strategy has placed the model; each rank loads its share.

    Args:
        weights: Weights that fit the model.
        embeddings: Token embeddings (rows, width) that fit the model.
    """

    def __init__(self, weights: Checkpoint | None, embeddings: Tensor | None) -> None:
        self.weights = weights
        self.embeddings = embeddings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights, before the first validation."""
        assert isinstance(pl_module, GPTModule)
        if self.weights is not None:
            restore_weights(pl_module.model, self.weights)
        if self.embeddings is not None:
            write_weight(pl_module.model.get_parameter(_embedding_name(pl_module)), self.embeddings)
        self.weights = self.embeddings = None  # close files and free memory


def begin(run: RunOptions, module: GPTModule, source: Checkpoint | None) -> tuple[list[str], list[InitialWeights]]:
    """Prepare the initial weights of a run.

    Returns:
        Lines that describe them, and the callback that loads them; both empty for a run from scratch or a resumed one.

    Raises:
        UserError: The weights do not fit the model.
    """
    if run.resume or not (source or run.pretrained_embeddings):
        return [], []
    lines, weights, embeddings = [], None, None
    if source:
        assert run.init_from is not None
        weights = fitted_weights(source, module)
        lines.append(f"weights   {describe(weights, name=run.init_from)}")
    if run.pretrained_embeddings:
        embeddings = fitted_embeddings(run.pretrained_embeddings, module, trust=run.trust_checkpoint)
        lines.append(f"embedding {run.pretrained_embeddings}: {embeddings.shape[0]:,} x {embeddings.shape[1]}")
    return lines, [InitialWeights(weights, embeddings)]


def fitted_weights(source: Checkpoint, module: GPTModule) -> AdaptedCheckpoint:
    """Adapt the weights of a checkpoint to a module.

    Raises:
        UserError: They do not fit, or the checkpoint is damaged.
    """
    source.require_fit(GPTModule.without_memory(source.implementation, model_config=source.model_config))
    return AdaptedCheckpoint(source, row=module.implementation, fields=module.model_config)


def fitted_embeddings(path: str, module: GPTModule, *, trust: bool) -> Tensor:
    """Read token embeddings and pad them to the rows of a module: (rows, width).

    Raises:
        UserError: There are no embeddings, or they do not fit.
    """
    matrix = read_embeddings(path, trust=trust)
    rows, width = full_shape(module.model.get_parameter(_embedding_name(module)))
    tokens = rows - module.model_config.get("vocab_padding", 0)
    if matrix.shape != (tokens, width):
        raise UserError(
            f"--pretrained_embeddings {path} has shape {tuple(matrix.shape)}; the model needs {(tokens, width)}, a row"
            " for each token"
        )
    return with_rows(matrix, rows)


def _embedding_name(module: GPTModule) -> str:
    return token_embedding_name(module.model, vocab_size=module.model_config["vocab_size"])


def describe(weights: AdaptedCheckpoint, *, name: str) -> str:
    """Describe in one line what is loaded and how it is adapted."""
    source = weights.source
    layout = source.layout()
    elements = sum(tensor.numel() for tensor in layout.values())
    have, want = source.model_config, weights.model_config
    parts = [f"{len(layout)} tensors, {elements:,} parameters"]
    if weights.implementation != source.implementation:
        parts.append(f"as {weights.implementation}")
    if want["block_size"] != have["block_size"]:
        verb = "cropped" if want["block_size"] < have["block_size"] else "extended"
        parts.append(f"block {have['block_size']} {verb} to {want['block_size']}")
    if want["vocab_size"] != have["vocab_size"]:
        verb = "padded" if want["vocab_size"] > have["vocab_size"] else "cut"
        parts.append(f"vocabulary {verb} to {want['vocab_size']:,}")
    return f"{name} ({source.kind}): {', '.join(parts)}"
