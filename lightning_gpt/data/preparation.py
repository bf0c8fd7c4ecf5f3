"""From what `--data` names to opened token files, tokenizing at most once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.corpora import Corpus, load_corpus
from lightning_gpt.data.encoding import encode_corpus
from lightning_gpt.data.token_files import (
    FORMAT_VERSION,
    TokenFiles,
    is_token_folder,
    open_token_files,
    write_token_files,
)
from lightning_gpt.tokenizers import Tokenizer, build_tokenizer, keep_tables, resolve_tokenizer

DEFAULT_TOKENIZER = "char"
TRAIN_FRACTION = 0.9


def prepare(
    data: str,
    *,
    tokenizer: str | Tokenizer | None,
    block_size: int,
    tokenizer_file: str | None = None,
    cache_dir: Path | None = None,
) -> TokenFiles:
    """Open a token folder, or tokenize a corpus into the cache and open that.

    A corpus is tokenized once: a later start with the same content and tokenizer finds the tokens in the cache. When
    several processes start at once, one does the work and the others wait for it.

    Args:
        data: A token folder, or anything that `load_corpus` takes.
        tokenizer: What ``--tokenizer`` says, or a tokenizer to use as it is; None means the one stored with the tokens,
            or char for a corpus.
        block_size: Tokens the model sees at once; the splits must be long enough for it.
        tokenizer_file: Tables of the tokenizer, which are checked and kept in the user's cache first.
        cache_dir: The cache folder; None means `cache_root()`.

    Raises:
        UserError: The data is missing, damaged, too short, or made with another tokenizer; or the cache cannot be
            written.
    """
    if isinstance(tokenizer, str):
        tokenizer = resolve_tokenizer(tokenizer)
    root = cache_dir or cache_root()
    folder = Path(data).expanduser()
    if data != "stdlib" and is_token_folder(folder):
        files = open_token_files(folder, cache_dir=root)
        _require_same(tokenizer, files, data=data)
        if tokenizer_file is not None:
            if files.tokenizer is None:
                raise UserError(f"--tokenizer_file: {data} does not say what its tokenizer is; leave it out")
            keep_tables(files.tokenizer, tokenizer_file)
    else:
        tokenizer = tokenizer or DEFAULT_TOKENIZER
        if tokenizer_file is not None:
            keep_tables(tokenizer, tokenizer_file)
        files = _cached(load_corpus(data), tokenizer=tokenizer, root=root)
    _check_lengths(files, block_size)
    return files


def write_corpus(folder: Path, *, corpus: Corpus, tokenizer: str | Tokenizer) -> None:
    """Tokenize a corpus into a token folder: the first 90 % of its characters to train on, the rest to validate.

    Args:
        folder: Where to; see `write_token_files`.
        corpus: The text.
        tokenizer: What ``--tokenizer`` says, or a tokenizer to use as it is.

    Raises:
        UserError: The text does not suit the tokenizer, is too short to split, or the folder cannot be written.
    """
    built = tokenizer
    if isinstance(built, str):
        built = build_tokenizer(built, corpus=corpus.content, source=corpus.source)
    cut = _cut(corpus.content)
    train, val = corpus.content[:cut], corpus.content[cut:]
    if not train or not val:
        raise UserError(f"{corpus.source} is too short to split into training and validation text; give more text")
    write_token_files(
        folder,
        train=encode_corpus(built, train, source=corpus.source),
        val=encode_corpus(built, val, source=corpus.source),
        tokenizer=built,
        vocab_size=built.vocab_size,
        source=corpus.source,
        train_bytes=len(train),
        val_bytes=len(val),
    )


def _cut(content: bytes) -> int:
    """Byte offset of the split: between characters where the content is text, as nanoGPT splits."""
    if not content.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode("utf-8")
            return len(text[: int(TRAIN_FRACTION * len(text))].encode("utf-8"))
    return int(TRAIN_FRACTION * len(content))


def _require_same(tokenizer: str | Tokenizer | None, files: TokenFiles, *, data: str) -> None:
    stored = files.tokenizer
    name = stored.name if stored else "unknown"
    if isinstance(tokenizer, str) and tokenizer != name:
        raise UserError(
            f"--tokenizer {tokenizer} does not fit {data}, whose tokenizer is {name}; leave --tokenizer out, "
            "or prepare the text again"
        )
    if isinstance(tokenizer, Tokenizer) and (stored is None or stored.to_dict() != tokenizer.to_dict()):
        raise UserError(
            f"the tokens of {data} were made by another tokenizer ({name}) than the one that is asked for "
            f"({tokenizer.name}); give the text itself, or prepare it again"
        )


def _cached(corpus: Corpus, *, tokenizer: str | Tokenizer, root: Path) -> TokenFiles:
    if isinstance(tokenizer, str):
        folder = _folder(corpus, tokenizer, root)
    else:
        # A run's own text lies where its training found it, by the name of its tokenizer.
        files = _opened(_folder(corpus, tokenizer.name, root), root)
        if files and files.tokenizer and files.tokenizer.to_dict() == tokenizer.to_dict():
            return files
        folder = _folder(corpus, json.dumps(tokenizer.to_dict(), sort_keys=True), root)
    # A folder appears whole or not at all, so a hit needs no lock and works in a cache that is read-only.
    if files := _opened(folder, root):
        return files
    with _locked(folder.with_suffix(".lock")):
        if files := _opened(folder, root):
            return files
        write_corpus(folder, corpus=corpus, tokenizer=tokenizer)
        return open_token_files(folder, cache_dir=root)


def _folder(corpus: Corpus, tokenizer: str, root: Path) -> Path:
    digest = hashlib.blake2b(f"{FORMAT_VERSION}\0{TRAIN_FRACTION}\0{tokenizer}\0".encode(), digest_size=16)
    digest.update(corpus.content)
    return root / "tokens" / digest.hexdigest()


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
