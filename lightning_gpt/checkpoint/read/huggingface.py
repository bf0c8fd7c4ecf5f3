"""Read folders that transformers wrote, and find models on the Hugging Face hub and in its cache."""

import contextlib
import functools
import re
from pathlib import Path

from torch import Tensor

from lightning_gpt.checkpoint.architectures import get_architecture
from lightning_gpt.checkpoint.architectures.gpt2 import TOKENS
from lightning_gpt.checkpoint.base import meta
from lightning_gpt.checkpoint.read.canonical import (
    CONFIG,
    WEIGHTS,
    read_layout,
    read_tensor,
    tokenizer_beside,
)
from lightning_gpt.checkpoint.read.foreign import ForeignCheckpoint
from lightning_gpt.checkpoint.read.mapped import MappedFile, unreadable
from lightning_gpt.config import UserError
from lightning_gpt.invocation import install_line
from lightning_gpt.parsing import read_json
from lightning_gpt.tokenizers import GPT2Tokenizer, HuggingFaceTokenizer, Tokenizer

PICKLED = "pytorch_model.bin"
# In order of preference; an index lists the files that hold the weights.
_FORMS = (WEIGHTS, f"{WEIGHTS}.index.json", PICKLED, f"{PICKLED}.index.json")
_TOKENIZER = "tokenizer.json"
_HEAD = "lm_head.weight"

_OF_OPENAI = re.compile(r"gpt2(-medium|-large|-xl)?")
_HUB_NAME = re.compile(r"gpt2(-medium|-large|-xl)?|[A-Za-z0-9][\w.-]*/[\w.-]+")


class HuggingFaceCheckpoint(ForeignCheckpoint):
    """A folder from ``save_pretrained`` or the hub, of any architecture that has an adapter.

    Args:
        path: The folder.
        trust: Whether ``pytorch_model.bin`` may hold Python objects.

    Raises:
        UserError: The architecture or one of its settings is not supported, weights are missing or damaged, or a file
            holds Python objects and is not trusted.
    """

    kind = "huggingface"

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        hf_config = read_json(path / CONFIG)
        architecture = get_architecture(hf_config["model_type"], source=path)
        tensors = _Tensors(_weight_files(path), trust=trust)
        stored, read = architecture.imported(tensors.stored, tensors.read)
        if _HEAD not in stored and "tie_word_embeddings" not in architecture.fixed:
            hf_config["tie_word_embeddings"] = True  # a tied head, or a model saved without its head
        try:
            row, fields = architecture.implementation_for(architecture.settings_from_hf(hf_config))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        tokenizer = _tokenizer(path, vocab_size=fields["vocab_size"])
        if tokenizer and tokenizer.vocab_size < fields["vocab_size"]:  # rows without a token
            fields["vocab_padding"] = fields["vocab_size"] - tokenizer.vocab_size
        super().__init__(path, row=row, fields=fields, stored=stored, read=read, tokenizer=tokenizer)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether the folder's config has a ``model_type``, as every config of transformers does."""
        with contextlib.suppress(UserError):
            config = read_json(path / CONFIG)
            return isinstance(config, dict) and isinstance(config.get("model_type"), str)
        return False


class _Tensors:
    """The tensors of several files by name, read one at a time.

    Args:
        files: Files of safetensors or ``torch.save``.
        trust: Whether files of ``torch.save`` may hold Python objects.
    """

    def __init__(self, files: list[Path], *, trust: bool) -> None:
        self.stored: dict[str, Tensor] = {}
        self._homes: dict[str, Path | MappedFile] = {}
        for path in files:
            if path.suffix == ".safetensors":
                found: dict[str, Tensor] = read_layout(path)
                home: Path | MappedFile = path
            else:
                home = MappedFile(path, trust=trust, files=len(files))
                found = {name: meta(tensor) for name, tensor in home.content.items()}
            self.stored |= found
            self._homes |= dict.fromkeys(found, home)

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
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
    """Return the files that an index lists.

    Raises:
        UserError: The file is not an index, or lists a file outside of its folder.
    """
    content = read_json(index)
    try:
        files = sorted(set(content["weight_map"].values()))
    except (AttributeError, LookupError, TypeError) as error:
        raise unreadable(index, error) from error
    if not files or any(Path(name).name != name for name in files):
        raise UserError(f"{index} does not list files in its own folder")
    return files


def _tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer | None:
    if own := tokenizer_beside(folder / WEIGHTS):
        return own
    if (folder / _TOKENIZER).is_file():
        return HuggingFaceTokenizer.build(str(folder / _TOKENIZER), corpus=None, source=str(folder))
    return GPT2Tokenizer() if vocab_size == TOKENS else None


def is_hub_name(name: str) -> bool:
    """Return whether a name can be a model on the Hugging Face hub: one of OpenAI's four, or ``owner/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_folder(name: str) -> Path:
    """Return the folder in the hub's cache with a model's config and weights, downloading them if needed.

    Args:
        name: As for ``is_hub_name``.

    Raises:
        UserError: huggingface_hub is not installed, there is no such model, or it is not in the cache and cannot be
            downloaded.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{name} is not a local path, and the Hugging Face hub needs a package: {install_line('huggingface')}"
        ) from None
    fetch = functools.partial(hf_hub_download, name)
    try:
        with contextlib.suppress(LocalEntryNotFoundError, UserError):  # not in the cache, or incomplete
            folder = Path(fetch(CONFIG, local_files_only=True)).parent
            for file in _weight_files(folder):
                fetch(file.name, local_files_only=True)
            return folder
        # This call fails at once without a network; downloads would retry for half a minute.
        available = {entry.rfilename for entry in HfApi().model_info(name, timeout=10).siblings or ()}
        folder = Path(fetch(CONFIG)).parent
        form = next((form for form in _FORMS if form in available), WEIGHTS)
        fetch(form)
        for file in _weight_files(folder):
            fetch(file.name)
        if _TOKENIZER in available and not _OF_OPENAI.fullmatch(name):  # OpenAI's is built in
            fetch(_TOKENIZER)
    except Exception as error:  # no such model, no network, a full disk: each library raises its own errors
        raise UserError(
            f"{name} is not a local path, and cannot be downloaded from the Hugging Face hub ({type(error).__name__});"
            f" without a network, put its {CONFIG} and {WEIGHTS} into a folder and give that folder"
        ) from error
    return folder
