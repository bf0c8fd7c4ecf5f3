"""Read the files that the original nanoGPT and minGPT save with ``torch.save``."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gpt.checkpoint.architectures.gpt2 import GPT2, TOKENS
from lightning_gpt.checkpoint.base import as_state, meta
from lightning_gpt.checkpoint.read.canonical import FORMAT, tokenizer_beside
from lightning_gpt.checkpoint.read.foreign import ForeignCheckpoint
from lightning_gpt.checkpoint.read.mapped import MappedFile
from lightning_gpt.config import UserError
from lightning_gpt.data.tokens.token_files import is_token_folder, read_meta_pickle
from lightning_gpt.implementations.registry import IMPLEMENTATIONS
from lightning_gpt.parsing import read_json, shown
from lightning_gpt.tokenizers import GPT2Tokenizer, Tokenizer

# Their file names, in nanoGPT's out_dir and minGPT's work_dir.
FILES = ("ckpt.pt", "model.pt")

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_POSITIONS = "transformer.wpe.weight"
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_GPT2 = GPT2()
_BEST = "nanoGPT{'monitor': 'val_loss'}"  # as the callback that keeps the best checkpoint names its state


class NanoGPTCheckpoint(ForeignCheckpoint):
    """nanoGPT's ``ckpt.pt``: exact GELU, tied head, and biases unless ``model_args`` says otherwise.

    It also holds the state of AdamW and the settings of the run, from which the run is resumed. Characters are known
    from the ``meta.pkl`` beside it, or in the folder ``data/DATASET`` that the settings name.

    Args:
        file: The opened file.

    Raises:
        UserError: Its ``model_args`` do not describe a model.
    """

    kind = "nanoGPT's own"

    def __init__(self, file: MappedFile) -> None:
        content, args = file.content, file.content["model_args"]
        sizes = {name: args.get(name) for name in _SIZES}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise UserError(
                    f"{file.path}: {name} of its model_args is {shown(value)}, it must be a positive whole number"
                )
        choices = {"gelu": "exact", "tied_head": True, "bias": bool(args.get("bias", True)), "position": "learned"}
        row, fields = _GPT2.implementation_for(choices | sizes)
        # nanoGPT pads GPT-2's vocabulary to a multiple of 64 and does not record it.
        padding = sizes["vocab_size"] - TOKENS
        if 0 < padding < 64:
            fields["vocab_padding"] = padding
        names = _GPT2.plain_names(content["model"])
        settings = _plain(content.get("config"))
        dataset = _dataset_folder(file.path, settings.get("dataset"))
        step = int(content.get("iter_num", 0))
        header: dict[str, Any] = {}
        accumulation, batch_size = settings.get("gradient_accumulation_steps"), settings.get("batch_size")
        if type(accumulation) is int and type(batch_size) is int:  # nanoGPT counts the micro-batches of all processes
            header["TokenData"] = {"consumed_samples": step * accumulation * batch_size}
        with contextlib.suppress(LookupError, TypeError, ValueError, RuntimeError):  # a number or a tensor
            header["callbacks"] = {_BEST: {"best_model_score": float(content["best_val_loss"])}}
        self._indices = _numbers_in_adamw(content, names)
        if self._indices:
            header["hyper_parameters"] = _hparams(content["optimizer"])
        super().__init__(
            file.path,
            row=row,
            fields=fields,
            stored={name: meta(content["model"][key]) for name, key in names.items()},
            read=lambda name: file.read(lambda content: content["model"][names[name]]),
            step=step,
            tokenizer=(
                tokenizer_beside(file.path)
                or _characters([file.path.parent, *([dataset] if dataset else [])], vocab_size=sizes["vocab_size"])
                or (GPT2Tokenizer() if 0 <= padding < 64 else None)
            ),
            header=header,
        )
        self._file = file
        self.settings, self.dataset = settings, dataset
        state = content["optimizer"]["state"] if self._indices else {}
        self.moments = {
            name: {key: meta(as_state(value)) for key, value in state[index].items()}
            for name, index in self._indices.items()
        }

    def _read_moment(self, name: str, key: str) -> Tensor:
        index = self._indices[name]
        return self._file.read(lambda content: as_state(content["optimizer"]["state"][index][key]))

    @staticmethod
    def recognises(content: Any) -> bool:
        """Return whether the content of a file has this form."""
        return isinstance(content, dict) and isinstance(content.get("model_args"), dict) and "model" in content


def _plain(config: Any) -> dict[str, Any]:
    """Return the settings of a run that are numbers, switches or texts."""
    if not isinstance(config, dict):
        return {}
    return {k: v for k, v in config.items() if isinstance(k, str) and type(v) in (bool, int, float, str)}


def _dataset_folder(path: Path, name: Any) -> Path | None:
    """Return nanoGPT's folder ``data/NAME``, beside the file, in a folder above it, or in the working directory."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    places = (folder / "data" / name for folder in (*path.resolve().parents, Path.cwd()))
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        return next((place for place in places if (place / "meta.pkl").is_file() or is_token_folder(place)), None)
    return None


def _characters(folders: Sequence[Path], *, vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer in the first ``meta.pkl`` that describes a vocabulary of this size."""
    for folder in folders:
        if (folder / "meta.pkl").is_file():
            size, tokenizer = read_meta_pickle(folder / "meta.pkl")
            if size == vocab_size:
                return tokenizer
    return None


def _numbers_in_adamw(content: dict[str, Any], names: dict[str, str]) -> dict[str, int]:
    """Return the number of each weight in the state of AdamW; empty if there is no state of these weights.

    nanoGPT numbers the matrices first, then the other weights, both in the order of the model.
    """
    try:
        weights = {name: content["model"][key] for name, key in names.items() if name != _HEAD}
        groups = ([n for n, w in weights.items() if w.dim() >= 2], [n for n, w in weights.items() if w.dim() < 2])
        stored = content["optimizer"]["param_groups"]
        numbers: dict[str, int] = {}
        for ours, group in zip(groups, stored, strict=True):
            numbers |= zip(ours, group["params"], strict=True)
        state = content["optimizer"]["state"]
        fits = all(state[i]["exp_avg"].shape == weights[n].shape for n, i in numbers.items())
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}
    return numbers if fits else {}


def _hparams(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of AdamW, by the names of ``GPTModule``; unknown ones are left out."""
    group = optimizer["param_groups"][0]
    names = {"weight_decay": "weight_decay", "initial_lr": "learning_rate", "lr": "learning_rate", "betas": "betas"}
    return {ours: group[name] for name, ours in names.items() if name in group}


class MinGPTCheckpoint(ForeignCheckpoint):
    """minGPT's state dict, which holds only weights: tanh GELU, untied head, biases.

    The number of heads comes from `n_head`, else from the ``config.json`` that minGPT writes beside it, else from the
    preset of the same size.

    Args:
        file: The opened file.
        n_head: Number of attention heads, if the user gives it.

    Raises:
        UserError: The number of heads is unknown, or the weights are another model's.
    """

    kind = "minGPT's own"

    def __init__(self, file: MappedFile, *, n_head: int | None = None) -> None:
        content = file.content
        names = _GPT2.plain_names(content)
        wte, wpe = content[names[_EMBEDDING]], content[names[_POSITIONS]]
        if wte.data_ptr() == content[names[_HEAD]].data_ptr():
            raise UserError(
                f"{file.path} has a tied head, so it is not minGPT's, and a state dict of nanoGPT's does not say"
                " enough; give its ckpt.pt"
            )
        n_layer = len({name.split(".")[2] for name in names if name.startswith("transformer.h.")})
        sizes = {"n_layer": n_layer, "n_embd": wte.shape[1], "block_size": wpe.shape[0], "vocab_size": wte.shape[0]}
        sizes["n_head"] = n_head or _heads_beside(file.path) or _heads_of_presets(sizes, path=file.path)
        choices = {"gelu": "tanh", "tied_head": False, "bias": True, "position": "learned"}
        row, fields = _GPT2.implementation_for(choices | sizes)
        super().__init__(
            file.path,
            row=row,
            fields=fields,
            stored={name: meta(content[key]) for name, key in names.items()},
            read=lambda name: file.read(lambda content: content[names[name]]),
            tokenizer=tokenizer_beside(file.path) or (GPT2Tokenizer() if sizes["vocab_size"] == TOKENS else None),
        )

    @staticmethod
    def recognises(content: Any) -> bool:
        """Return whether the content of a file has this form."""
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            return False
        return {_EMBEDDING, _POSITIONS, _HEAD} <= _GPT2.plain_names(content).keys()


def _presets() -> dict[str, dict[str, int]]:
    return {k: v for row in IMPLEMENTATIONS.values() if row.presets for k, v in row.load(row.presets).items()}


def _heads_beside(path: Path) -> int | None:
    """Return the number of heads in a ``config.json``: minGPT's, with n_head or a preset, or that of our export."""
    try:
        content = read_json(path.parent / "config.json")
        config = content["model_config" if content.get("format") == FORMAT else "model"]
        heads = config.get("n_head") or _presets()[config["model_type"]]["n_head"]
    except (UserError, LookupError, TypeError, AttributeError):
        return None
    return heads if type(heads) is int else None


def _heads_of_presets(sizes: dict[str, int], *, path: Path) -> int:
    fits = {
        preset["n_head"]
        for preset in _presets().values()
        if (preset["n_layer"], preset["n_embd"]) == (sizes["n_layer"], sizes["n_embd"])
    }
    if len(fits) != 1:
        raise UserError(
            f"{path} does not say how many attention heads it has; put minGPT's config.json beside it, or start from"
            " it with --n_head"
        )
    return fits.pop()
