"""What nanoGPT and minGPT themselves save: files of ``torch.save``."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gpt.checkpoint.architectures.gpt2 import TOKENS, gpt2_names, row_for
from lightning_gpt.checkpoint.base import MappedFile
from lightning_gpt.checkpoint.read.canonical import FORMAT, tokenizer_beside
from lightning_gpt.checkpoint.read.foreign import ForeignCheckpoint
from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, GPT2Traits
from lightning_gpt.tokenizers import GPT2Tokenizer

# What the two call their files; each lies in the folder that is given as its --out_dir or work_dir.
FILES = ("ckpt.pt", "model.pt")

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


class NanoGPTCheckpoint(ForeignCheckpoint):
    """nanoGPT's ``ckpt.pt``: exact GELU, tied head, biases as ``model_args`` says (all, in files of before it did).

    Args:
        file: The file, opened.

    Raises:
        UserError: Its ``model_args`` do not make a model.
    """

    kind = "nanoGPT's own"

    def __init__(self, file: MappedFile) -> None:
        content, source = file.content, str(file.path)
        args = content["model_args"]
        sizes = {name: args.get(name) for name in _SIZES}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{source}: {name} of its model_args is {value!r}, it must be a positive whole number")
        row, fields = _expressed(GPT2Traits(gelu="exact", bias=bool(args.get("bias", True))), sizes, source=source)
        # Where nothing says otherwise nanoGPT's tokens are GPT-2's, their vocabulary padded to a multiple of 64.
        padding = sizes["vocab_size"] - TOKENS
        if 0 < padding < 64:
            fields["vocab_padding"] = padding
        super().__init__(
            file.path,
            row=row,
            fields=fields,
            names=gpt2_names(content["model"]),
            tensors=content["model"],
            read=lambda key: file.read(lambda content: content["model"][key]),
            step=int(content.get("iter_num", 0)),
            tokenizer=tokenizer_beside(file.path) or (GPT2Tokenizer() if 0 <= padding < 64 else None),
        )

    @staticmethod
    def holds(content: Any) -> bool:
        """Whether a file's content is one."""
        return isinstance(content, dict) and isinstance(content.get("model_args"), dict) and "model" in content


class MinGPTCheckpoint(ForeignCheckpoint):
    """A state dict of minGPT's, which says nothing but the weights: tanh GELU, a head of its own, biases.

    How many heads it has is taken from ``n_head``, from the ``config.json`` that minGPT writes beside it, or from the
    preset of its size.

    Args:
        file: The file, opened.
        n_head: Attention heads, where the user says so.

    Raises:
        UserError: Nothing says how many heads it has, or it is another model's.
    """

    kind = "minGPT's own"

    def __init__(self, file: MappedFile, *, n_head: int | None = None) -> None:
        content, source = file.content, str(file.path)
        names = gpt2_names(content)
        wte, wpe = content[names[_EMBEDDING]], content[names["transformer.wpe.weight"]]
        if wte.data_ptr() == content[names[_HEAD]].data_ptr():
            raise UserError(
                f"{source} has a head that is its token embedding, so it is no minGPT's, and a state dict of nanoGPT's"
                " does not say enough; give its ckpt.pt"
            )
        n_layer = len({name.split(".")[2] for name in names if name.startswith("transformer.h.")})
        sizes = {"n_layer": n_layer, "n_embd": wte.shape[1], "block_size": wpe.shape[0], "vocab_size": wte.shape[0]}
        sizes["n_head"] = n_head or _heads_beside(file.path) or _heads_of_presets(sizes, source=source)
        row, fields = _expressed(GPT2Traits(tied=False), sizes, source=source)
        super().__init__(
            file.path,
            row=row,
            fields=fields,
            names=names,
            tensors=content,
            read=lambda key: file.read(lambda content: content[key]),
            tokenizer=tokenizer_beside(file.path) or (GPT2Tokenizer() if sizes["vocab_size"] == TOKENS else None),
        )

    @staticmethod
    def holds(content: Any) -> bool:
        """Whether a file's content is one."""
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            return False
        return {_EMBEDDING, "transformer.wpe.weight", _HEAD} <= gpt2_names(content).keys()


def _expressed(traits: GPT2Traits, sizes: dict[str, int], *, source: str) -> tuple[Any, dict[str, Any]]:
    row = row_for(traits, source=source)
    assert row.gpt2 is not None
    return row, row.gpt2.fields(traits) | sizes


def _presets() -> dict[str, dict[str, int]]:
    return {k: v for row in IMPLEMENTATIONS.values() if row.presets for k, v in row.load(row.presets).items()}


def _heads_beside(path: Path) -> int | None:
    """What a ``config.json`` says: minGPT's own, which names either the heads or a preset, or ours, of an export."""
    try:
        content = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        said = content["model_config" if content.get("format") == FORMAT else "model"]
        heads = said.get("n_head") or _presets()[said["model_type"]]["n_head"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return heads if type(heads) is int else None


def _heads_of_presets(sizes: dict[str, int], *, source: str) -> int:
    fits = {
        preset["n_head"]
        for preset in _presets().values()
        if (preset["n_layer"], preset["n_embd"]) == (sizes["n_layer"], sizes["n_embd"])
    }
    if len(fits) != 1:
        raise UserError(
            f"{source} does not say how many attention heads it has; put minGPT's config.json beside it, or start from"
            " it with --n_head"
        )
    return fits.pop()
