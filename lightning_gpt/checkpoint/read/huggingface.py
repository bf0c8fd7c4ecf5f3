"""A folder of Hugging Face's GPT-2, and where to get one: the hub and its cache."""

import contextlib
import functools
import json
import re
from pathlib import Path

from torch import Tensor

from lightning_gpt.checkpoint.architectures.gpt2 import TOKENS, fields_from_gpt2, gpt2_names, row_for, traits_from_gpt2
from lightning_gpt.checkpoint.base import MappedFile, meta, unreadable
from lightning_gpt.checkpoint.read.canonical import CONFIG, WEIGHTS, layout, read_json, read_tensor, tokenizer_beside
from lightning_gpt.checkpoint.read.foreign import ForeignCheckpoint
from lightning_gpt.config import UserError
from lightning_gpt.tokenizers import GPT2Tokenizer, HuggingFaceTokenizer, Tokenizer

PICKLED = "pytorch_model.bin"
# The first that is there is read; an index names the files that the weights are spread over.
_FORMS = (WEIGHTS, f"{WEIGHTS}.index.json", PICKLED, f"{PICKLED}.index.json")
_TOKENIZER = "tokenizer.json"

_OF_OPENAI = re.compile(r"gpt2(-medium|-large|-xl)?")
_HUB_NAME = re.compile(r"gpt2(-medium|-large|-xl)?|[A-Za-z0-9][\w.-]*/[\w.-]+")


class HuggingFaceCheckpoint(ForeignCheckpoint):
    """A folder that ``GPT2LMHeadModel.save_pretrained`` or the hub made.

    Args:
        path: The folder.
        trust: Whether ``pytorch_model.bin`` may hold Python objects.

    Raises:
        UserError: It is another model, no implementation can express it, its weights are missing, damaged, or hold
            Python objects and are not trusted.
    """

    kind = "huggingface"

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        config = read_json(path / CONFIG)
        if config["model_type"] != "gpt2":
            raise UserError(f"{path} holds a model of type {config['model_type']}; of Hugging Face's, gpt2 is read")
        tensors = _Tensors(_weight_files(path), trust=trust)
        names = gpt2_names(tensors.stored)
        if "lm_head.weight" not in names:  # as a tied head is saved, and a model without one
            config["tie_word_embeddings"] = True
        row = row_for(traits_from_gpt2(config, source=str(path)), source=str(path))
        fields = fields_from_gpt2(row, config, source=str(path))
        tokenizer = _tokenizer(path, vocab_size=fields["vocab_size"])
        if tokenizer and tokenizer.vocab_size < fields["vocab_size"]:  # rows that no token stands for
            fields["vocab_padding"] = fields["vocab_size"] - tokenizer.vocab_size
        super().__init__(
            path,
            row=row,
            fields=fields,
            names=names,
            tensors=tensors.stored,
            read=tensors.read,
            tokenizer=tokenizer,
            transposed=True,
        )

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder whose config names a type of model, as all of Hugging Face's do."""
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            return isinstance(config, dict) and isinstance(config.get("model_type"), str)
        return False


class _Tensors:
    """The tensors of some files by name, read one at a time.

    Args:
        files: Safetensors files or files of ``torch.save``.
        trust: Whether the latter may hold Python objects.
    """

    def __init__(self, files: list[Path], *, trust: bool) -> None:
        self.stored: dict[str, Tensor] = {}
        self._homes: dict[str, Path | MappedFile] = {}
        for path in files:
            if path.suffix == ".safetensors":
                found: dict[str, Tensor] = layout(path)
                home: Path | MappedFile = path
            else:
                home = MappedFile(path, trust=trust, files=len(files))
                found = {name: meta(tensor) for name, tensor in home.content.items()}
            self.stored |= found
            self._homes |= dict.fromkeys(found, home)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        home = self._homes[name]
        return read_tensor(home, name) if isinstance(home, Path) else home.read(lambda content: content[name])


def _weight_files(folder: Path) -> list[Path]:
    form = next((folder / name for name in _FORMS if (folder / name).is_file()), None)
    if form is None:
        raise UserError(f"{folder} holds no weights; put {WEIGHTS} or {PICKLED} beside its {CONFIG}")
    if form.suffix != ".json":
        return [form]
    return [folder / name for name in _shards(form)]


def _shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        UserError: It is no index, or names a file outside of its folder.
    """
    content = read_json(index)
    try:
        files = sorted(set(content["weight_map"].values()))
    except (AttributeError, LookupError, TypeError) as error:
        raise unreadable(index, error) from error
    if not files or any(Path(name).name != name for name in files):
        raise UserError(f"{index} does not name files of its own folder")
    return files


def _tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer | None:
    if own := tokenizer_beside(folder / WEIGHTS):
        return own
    if (folder / _TOKENIZER).is_file():
        return HuggingFaceTokenizer.build(str(folder / _TOKENIZER), corpus=None, source=str(folder))
    return GPT2Tokenizer() if vocab_size == TOKENS else None


def is_hub_name(name: str) -> bool:
    """Whether a text can be a model's name on the Hugging Face hub: one of OpenAI's four, or ``owner/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_folder(name: str) -> Path:
    """The folder in the hub's cache with a model's config and weights, downloaded where they are not there yet.

    Args:
        name: As for ``is_hub_name``.

    Raises:
        UserError: huggingface_hub is not installed, there is no such model, or it can neither be found in the cache
            nor downloaded.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{name} is no local path, and the Hugging Face hub needs a package: pip install -r"
            " requirements/huggingface.txt"
        ) from None
    fetch = functools.partial(hf_hub_download, name)
    try:
        with contextlib.suppress(LocalEntryNotFoundError, UserError):  # not there, or in part
            folder = Path(fetch(CONFIG, local_files_only=True)).parent
            for file in _weight_files(folder):
                fetch(file.name, local_files_only=True)
            return folder
        # Asked first, since this one gives up at once where there is no network; downloads try for half a minute.
        there = {entry.rfilename for entry in HfApi().model_info(name, timeout=10).siblings or ()}
        folder = Path(fetch(CONFIG)).parent
        form = next((form for form in _FORMS if form in there), WEIGHTS)
        fetch(form)
        for file in _weight_files(folder):
            fetch(file.name)
        if _TOKENIZER in there and not _OF_OPENAI.fullmatch(name):  # whose tokenizer is known
            fetch(_TOKENIZER)
    except Exception as error:  # no such model, no network, a full disk: each library in between has its own
        raise UserError(
            f"{name} is no local path, and cannot be had from the Hugging Face hub ({type(error).__name__}); without a"
            f" network, put its {CONFIG} and {WEIGHTS} into a folder and give that folder"
        ) from error
    return folder
