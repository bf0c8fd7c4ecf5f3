"""From what `--data` names to opened token files, tokenizing at most once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from lightning_gpt.config import UserError
from lightning_gpt.data.corpora import Corpus, load_corpus
from lightning_gpt.data.token_files import (
    FORMAT_VERSION,
    TokenFiles,
    cache_root,
    is_token_folder,
    open_token_files,
)
from lightning_gpt.data.tokenizing import Plan, write_corpus
from lightning_gpt.tokenizers import TOKENIZERS

DEFAULT_TOKENIZER = "char"
VAL_FRACTION = 0.1


def prepare(data: str, *, tokenizer: str | None, block_size: int, cache_dir: Path | None = None) -> TokenFiles:
    """Open a token folder, or tokenize a corpus into the cache and open that.

    A corpus is tokenized once: a later start with the same content and tokenizer finds the tokens in the cache. When
    several processes start at once, one does the work and the others wait for it.

    Args:
        data: A token folder, or anything that `load_corpus` takes.
        tokenizer: A key of `TOKENIZERS`; None means the one stored with the tokens, or char for a corpus.
        block_size: Tokens the model sees at once; the splits must be long enough for it.
        cache_dir: The cache folder; None means `cache_root()`.

    Raises:
        UserError: The data is missing, damaged, too short, or made with another tokenizer; or the cache cannot be
            written.
    """
    if tokenizer is not None and tokenizer not in TOKENIZERS:
        raise UserError(f"--tokenizer {tokenizer} is not known; choose from {', '.join(TOKENIZERS)}")
    root = cache_dir or cache_root()
    folder = Path(data).expanduser()
    if data != "stdlib" and is_token_folder(folder):
        files = open_token_files(folder, cache_dir=root)
        stored = files.tokenizer.name if files.tokenizer else "unknown"
        if tokenizer not in (None, stored):
            raise UserError(
                f"--tokenizer {tokenizer} does not fit {data}, whose tokenizer is {stored}; leave --tokenizer out, "
                "or prepare the text again"
            )
    else:
        files = _cached(load_corpus(data), name=tokenizer or DEFAULT_TOKENIZER, root=root)
    _check_lengths(files, block_size)
    return files


def _cached(corpus: Corpus, *, name: str, root: Path) -> TokenFiles:
    digest = hashlib.blake2b(f"{FORMAT_VERSION}\0{VAL_FRACTION}\0{name}\0".encode(), digest_size=16)
    for block in corpus.joined():
        digest.update(block.data)
    folder = root / "tokens" / digest.hexdigest()
    # A folder appears whole or not at all, so a hit needs no lock and works in a cache that is read-only.
    if files := _opened(folder, root):
        return files
    with _locked(folder.with_suffix(".lock")):
        if files := _opened(folder, root):
            return files
        write_corpus(folder, corpus=corpus, plan=Plan(tokenizer=name, val_fraction=VAL_FRACTION))
        return open_token_files(folder, cache_dir=root)


def _opened(folder: Path, root: Path) -> TokenFiles | None:
    """The cached token files, or None where there are none or they are damaged and have to be made again."""
    if folder.exists():
        with contextlib.suppress(UserError):
            return open_token_files(folder, cache_dir=root)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(
            f"the cache folder {path.parent} cannot be written ({error.strerror}); "
            "set LIGHTNING_GPT_CACHE to a folder that can"
        ) from error
    with file:
        # Windows has no fcntl, and some network file systems have no locks: processes may then do the work twice.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_lengths(files: TokenFiles, block_size: int) -> None:
    if files.train_tokens < block_size + 1:
        raise UserError(
            f"the training split has {files.train_tokens} tokens, but --block_size {block_size} needs at least "
            f"{block_size + 1}; give more text or a smaller --block_size"
        )
    if files.val_tokens < 2:
        raise UserError(f"the validation split has {files.val_tokens} token, but needs at least 2; give more text")
