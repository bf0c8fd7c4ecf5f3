"""Export a checkpoint for other programs: as a Hugging Face folder, safetensors, a plain state dict or nanoGPT's file.

A format is a function that takes a checkpoint and its target folder and returns, for each file name, a function that
writes the file. It raises before anything is written if the format cannot express the model. A new format is one
function and one row in ``FORMATS``. Every export also holds our own tokenizer file, checksums, and
``lightning_gpt_export.txt``, which lists the written files: a later export may replace a folder that holds no others.
"""

import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gpt.checkpoint.architectures import ARCHITECTURES, Architecture, architecture_of
from lightning_gpt.checkpoint.base import Checkpoint, empty_model, meta
from lightning_gpt.checkpoint.read.canonical import CONFIG, STATE_DICT, TOKENIZER, WEIGHTS
from lightning_gpt.checkpoint.write.canonical import (
    describe,
    whole_folder,
    write_json,
    write_safetensors,
    write_weights,
)
from lightning_gpt.checkpoint.write.hf_tokenizer import tokenizer_config, tokenizer_json
from lightning_gpt.checksums import MANIFEST as CHECKSUMS
from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.tokenizers import CharTokenizer, Tokenizer

MANIFEST = "lightning_gpt_export.txt"

Files = dict[str, Callable[[Path], object]]


class Unpadded(Checkpoint):
    """A checkpoint without the padding of its vocabulary.

    Args:
        padded: The checkpoint; its model config has ``vocab_padding``.
    """

    def __init__(self, padded: Checkpoint) -> None:
        config = padded.model_config
        config = config | {"vocab_size": config["vocab_size"] - config["vocab_padding"], "vocab_padding": 0}
        hparams = padded.header["hyper_parameters"] | {"model_config": config}
        super().__init__(padded.path, padded.header | {"hyper_parameters": hparams})
        self._padded = padded
        model = empty_model(self.implementation, model_config=config)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.stored = {name: meta(tensor, shape=self._shapes[name]) for name, tensor in padded.stored.items()}
        self.moments = {
            name: {key: self._cut(tensor, name) for key, tensor in state.items()}
            for name, state in padded.moments.items()
        }

    def _cut(self, tensor: Tensor, name: str) -> Tensor:
        # Cloned, because torch.save would store the whole tensor behind a slice.
        return tensor[tuple(map(slice, self._shapes[name]))].clone() if tensor.dim() else tensor

    def _read(self, name: str) -> Tensor:
        return self._cut(self._padded.weight(name), name)

    def _read_moment(self, name: str, key: str) -> Tensor:
        return self._cut(self._padded.moment(f"{name}/{key}"), name)


def export(checkpoint: Checkpoint, folder: Path, *, form: str) -> Path:
    """Write a checkpoint in a form for other programs, without the padding of its vocabulary.

    The folder appears whole or not at all; an earlier export is replaced.

    Args:
        checkpoint: The checkpoint.
        folder: The folder to create or replace.
        form: A key of ``FORMATS``.

    Returns:
        The folder, with symbolic links resolved.

    Raises:
        UserError: The format cannot express the model or its tokenizer, or the folder holds other files or cannot be
            written.
    """
    folder = folder.resolve()
    _require_replaceable(folder, source=checkpoint.path.resolve())
    if checkpoint.model_config.get("vocab_padding"):
        checkpoint = Unpadded(checkpoint)
    files = FORMATS[form](checkpoint, folder)
    if checkpoint.tokenizer is not None:
        files[TOKENIZER] = _json(checkpoint.tokenizer.to_dict())
    names = "".join(f"{name}\n" for name in (*files, MANIFEST, CHECKSUMS))
    with whole_folder(folder, source=checkpoint.path) as part:
        for name, write in files.items():
            write(part / name)
        (part / MANIFEST).write_text(names, encoding="utf-8")
    return folder


def _require_replaceable(folder: Path, *, source: Path) -> None:
    if source.is_relative_to(folder) or folder.is_relative_to(source):
        raise UserError(
            f"--out {folder} and the checkpoint {source} must not contain each other; choose another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    manifest = folder / MANIFEST
    ours = manifest.read_text(encoding="utf-8", errors="replace").splitlines() if manifest.is_file() else []
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    stranger = next((name for name in found if name not in ours), None)
    if stranger is not None:
        raise UserError(
            f"--out {folder} holds {stranger}, which no export wrote; move it away, or choose another folder"
        )


def _json(content: Any) -> Callable[[Path], object]:
    return partial(write_json, content=content)


def _safetensors(checkpoint: Checkpoint, folder: Path) -> Files:
    return {CONFIG: _json(describe(checkpoint)), WEIGHTS: partial(write_weights, checkpoint=checkpoint)}


def _pt(checkpoint: Checkpoint, folder: Path) -> Files:
    return {CONFIG: _json(describe(checkpoint)), STATE_DICT: lambda path: torch.save(checkpoint.state_dict(), path)}


def _architecture(
    checkpoint: Checkpoint, *, form: str, model_type: str | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a checkpoint, `model_type` if one is given, and its settings.

    Raises:
        UserError: Hugging Face has no such model, or it is of another architecture.
    """
    row = get_implementation(checkpoint.implementation)
    try:
        architecture = architecture_of(row)
        if model_type is not None and model_type != architecture.model_type:
            raise ValueError(f"--implementation {row.name} is not a {ARCHITECTURES[model_type].name}")
        settings = architecture.settings(row, checkpoint.model_config)
        architecture.hf_config(settings)
    except ValueError as error:
        raise UserError(
            f"--export {form} cannot express {checkpoint.path}: {error}; use --export safetensors or pt"
        ) from error
    return architecture, settings


def _hf(checkpoint: Checkpoint, folder: Path) -> Files:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open as the same model and tokenizer."""
    architecture, settings = _architecture(checkpoint, form="hf")
    hf_config = architecture.hf_config(settings)
    layout, read = architecture.exported(checkpoint.layout(), checkpoint.weight)
    tokenizer = checkpoint.tokenizer
    # Written even if there is no such token, because Hugging Face's defaults are token ids.
    hf_config |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text if tokenizer else None)
    hf_config["torch_dtype"] = str(next(iter(layout.values())).dtype).removeprefix("torch.")
    files: Files = {CONFIG: _json(hf_config), WEIGHTS: partial(write_safetensors, layout=layout, read=read)}
    if tokenizer is None:
        print(f"{checkpoint.path} does not record its tokenizer: AutoTokenizer cannot open the export", file=sys.stderr)
        return files
    text = tokenizer_json(tokenizer)
    hf_tokenizer_config = tokenizer_config(tokenizer, text, block_size=checkpoint.model_config["block_size"])
    files["tokenizer.json"] = lambda path: path.write_text(text, encoding="utf-8")
    return files | {"tokenizer_config.json": _json(hf_tokenizer_config)}


def _nanogpt(checkpoint: Checkpoint, folder: Path) -> Files:
    """Write a ``ckpt.pt`` for the original's sample.py and, if there is AdamW state, for its train.py."""
    _, settings = _architecture(checkpoint, form="nanogpt", model_type="gpt2")
    lacks = ["the tanh GELU"] if settings["gelu"] != "exact" else []
    lacks += [] if settings["tied_head"] else ["an untied head"]
    if lacks:
        raise UserError(
            f"--export nanogpt cannot express {checkpoint.path}: nanoGPT does not have {' or '.join(lacks)}, as this"
            f" model of --implementation {checkpoint.implementation} has; use --export hf"
        )
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.name not in NANOGPT_TOKENIZERS:
        raise UserError(
            f"--export nanogpt cannot express the {tokenizer.name} tokenizer of {checkpoint.path}: nanoGPT has only"
            f" {' and '.join(NANOGPT_TOKENIZERS)}; use --export hf, safetensors or pt"
        )
    args = {name: settings[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias")}
    args["dropout"] = checkpoint.model_config.get("dropout", 0.0)

    with_optimizer = checkpoint.has_optimizer and checkpoint.optimizer == "adamw"
    if checkpoint.has_optimizer and not with_optimizer:
        print(
            f"{checkpoint.path}: the state of {checkpoint.optimizer} is left out, because nanoGPT has only AdamW",
            file=sys.stderr,
        )

    def write(path: Path) -> None:
        content = {
            "model": checkpoint.state_dict(),
            "model_args": args,
            "iter_num": checkpoint.step,
            "best_val_loss": min(checkpoint.best_loss, 1e9),  # 1e9 is nanoGPT's initial value
            # The original reads data/DATASET/meta.pkl in its own folder; an absolute DATASET makes it read this one.
            "config": args | {"dataset": str(folder)},
        }
        if with_optimizer:
            content["optimizer"] = _adamw(checkpoint)
        torch.save(content, path)

    return {"ckpt.pt": write, **(NANOGPT_TOKENIZERS[tokenizer.name](tokenizer) if tokenizer else {})}


def _adamw(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the optimizer state with nanoGPT's numbering of parameters: matrices first, then the others."""
    model = empty_model(checkpoint.implementation, model_config=checkpoint.model_config).to("meta")
    parameters = dict(model.named_parameters())
    groups = ([n for n, p in parameters.items() if p.dim() >= 2], [n for n, p in parameters.items() if p.dim() < 2])
    hparams = checkpoint.header["hyper_parameters"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in names], "weight_decay": decay}
            for names, decay in zip(groups, (hparams["weight_decay"], 0.0), strict=True)
        ],
        lr=hparams["learning_rate"],
        betas=tuple(hparams["betas"]),
    )
    moments = (checkpoint.optimizer_state(name) for names in groups for name in names)
    return optimizer.state_dict() | {"state": {index: state for index, state in enumerate(moments) if state}}


def _meta_pkl(tokenizer: Tokenizer) -> Files:
    assert isinstance(tokenizer, CharTokenizer)
    content = {
        "vocab_size": tokenizer.vocab_size,
        "stoi": {char: index for index, char in enumerate(tokenizer.chars)},
        "itos": dict(enumerate(tokenizer.chars)),
    }
    return {"meta.pkl": lambda path: path.write_bytes(pickle.dumps(content))}


# Files that the original reads beside ckpt.pt; without a meta.pkl it uses GPT-2's tokens.
NANOGPT_TOKENIZERS: dict[str, Callable[[Tokenizer], Files]] = {"char": _meta_pkl, "gpt2": lambda tokenizer: {}}

FORMATS: dict[str, Callable[[Checkpoint, Path], Files]] = {
    "hf": _hf,
    "safetensors": _safetensors,
    "pt": _pt,
    "nanogpt": _nanogpt,
}
