"""Open or create the token files that `--data` names, and create those that prepare.py writes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gpt.atomic import locked
from lightning_gpt.config import UserError, cache_root
from lightning_gpt.config.commands import PrepareOptions
from lightning_gpt.data.text.corpora import Corpus, find_corpus, load_corpus
from lightning_gpt.data.text.sets import NAMED_SETS, NamedSet
from lightning_gpt.data.tokens.encoding import LIMIT_BYTES
from lightning_gpt.data.tokens.token_files import (
    FORMAT_VERSION,
    TokenFiles,
    is_token_folder,
    open_token_files,
)
from lightning_gpt.data.tokens.tokenizing import Plan, write_corpus
from lightning_gpt.data.tokens.writing import SPLITS
from lightning_gpt.tokenizers import CharTokenizer, Tokenizer, keep_tables, resolve_tokenizer

DEFAULT_TOKENIZER = "char"
CHARGPT = "chargpt:"
VAL_FRACTION = 0.1


def prepare(
    data: str,
    *,
    tokenizer: str | Tokenizer | None,
    block_size: int,
    tokenizer_file: str | None = None,
    cache_dir: Path | None = None,
) -> TokenFiles:
    """Open a token folder, or tokenize a corpus into the cache and open that.

    A corpus is tokenized once: later runs with the same content and tokenizer find the tokens in the cache. If several
    processes start at once, one tokenizes and the others wait.

    Args:
        data: A token folder, a corpus as for `load_corpus`, or `chargpt:` and a corpus.
        tokenizer: The value of ``--tokenizer``, or a tokenizer; None means the one stored with the tokens, or char for
            a corpus.
        block_size: Context length of the model in tokens; the training split must be longer.
        tokenizer_file: Tables of the tokenizer, which are checked and copied to the cache first.
        cache_dir: The cache folder; None means `cache_root()`.

    Raises:
        UserError: The data is missing, damaged, too short or made with another tokenizer, or the cache cannot be
            written.
    """
    if data.startswith(CHARGPT):
        data, tokenizer = data.removeprefix(CHARGPT), tokenizer or CharTokenizer.name
        name = tokenizer.name if isinstance(tokenizer, Tokenizer) else tokenizer
        if name != CharTokenizer.name:
            raise UserError(
                f"--tokenizer {name}: --data {CHARGPT}{data} is tokenized by characters; leave --tokenizer out"
            )
    if isinstance(tokenizer, str):
        tokenizer = resolve_tokenizer(tokenizer)
    root = cache_dir or cache_root()
    folder = Path(data).expanduser()
    if data != "stdlib" and is_token_folder(folder):
        files = open_token_files(folder, cache_dir=root)
        _require_same(tokenizer, files, data=data)
        if tokenizer_file is not None:
            if files.tokenizer is None:
                raise UserError(f"--tokenizer_file: {data} does not record its tokenizer; leave --tokenizer_file out")
            keep_tables(files.tokenizer, tokenizer_file)
    else:
        tokenizer = tokenizer or DEFAULT_TOKENIZER
        if tokenizer_file is not None:
            keep_tables(tokenizer, tokenizer_file)
        corpus = load_corpus(data)
        # The same text may have been tokenized under another name.
        files = dataclasses.replace(_cached(corpus, tokenizer=tokenizer, root=root), source=corpus.source)
    _check_lengths(files, block_size)
    return files


def prepare_folder(options: PrepareOptions) -> str:
    """Create the token folder that prepare.py was asked for.

    A single text file is one text, split by its tail. Otherwise every file, or every row, is a document.

    Args:
        options: The options of prepare.py.

    Returns:
        A summary of the folder, several lines.

    Raises:
        UserError: Something is missing, wrong or damaged; no folder was created or replaced.
    """
    if options.out is None:
        raise UserError("--out is missing; name the folder for the token files")
    corpus, named = _named_corpus(options) or (None, None)
    tokenizer = resolve_tokenizer(options.tokenizer or (named.tokenizer if named else "gpt2"))
    if options.tokenizer_file is not None:
        keep_tables(tokenizer, options.tokenizer_file)
    corpus = corpus or find_corpus(options.inputs, field=options.field)
    plan = Plan(
        tokenizer=tokenizer,
        split="tail" if corpus.is_one_text else "document",
        val_fraction=options.val_fraction or (named.val_fraction if named else VAL_FRACTION),
        seed=None if corpus.is_one_text else options.seed,
        workers=options.workers,
    )
    folder = Path(options.out).expanduser()
    started = time.monotonic()
    try:
        meta = write_corpus(folder, corpus=corpus, plan=plan, say=lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise
    return "\n".join(_summary(meta, folder, time.monotonic() - started))


def _named_corpus(options: PrepareOptions) -> tuple[Corpus, NamedSet] | None:
    names = [name for name in options.inputs if name in NAMED_SETS]
    if names and len(options.inputs) > 1:
        raise UserError(
            f"{names[0]} cannot be combined with other inputs; give it alone, or ./{names[0]} for a file or"
            " folder of that name"
        )
    if options.from_file is not None and not names:
        raise UserError(f"--from {options.from_file}: it needs a named data set; add one of {', '.join(NAMED_SETS)}")
    if not options.inputs:
        raise UserError(f"name what to prepare: {', '.join(NAMED_SETS)}, or files and folders")
    if not names:
        return None
    named = NAMED_SETS[names[0]]
    return named.find(options.from_file, options.field), named


def _summary(meta: dict[str, Any], folder: Path, seconds: float) -> Iterator[str]:
    yield f"{folder}: tokenizer {meta['tokenizer']['name']}, {meta['vocab_size']:,} symbols, {meta['dtype']}"
    for split in SPLITS:
        yield f"{split:5} {meta[f'{split}_tokens']:>15,} tokens of {meta[f'{split}_bytes']:>15,} bytes"
    split_by = meta["split"]
    if split_by["by"] == "tail":
        yield f"split by tail: the last {split_by['val_fraction']:g} of the characters are for validation"
    else:
        counts = (f"{split_by[f'{split}_documents']:,} {split}" for split in SPLITS)
        yield (
            f"split by document: {' and '.join(counts)}, each for validation with probability "
            f"{split_by['val_fraction']:g}, seed {split_by['seed']}"
        )
    if meta["rough_cuts"]:
        limit = f"{LIMIT_BYTES >> 20} MiB of text"
        yield f"{meta['rough_cuts']:,} cuts where {limit} had no safe place to cut; they may have added tokens"
    yield f"{(meta['train_bytes'] + meta['val_bytes']) / 1e6:,.1f} MB of text in {seconds:,.1f} s"


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
            f"the tokens of {data} were made by another tokenizer ({name}) than the requested {tokenizer.name}; "
            "give the text itself, or prepare it again"
        )


def _cached(corpus: Corpus, *, tokenizer: str | Tokenizer, root: Path) -> TokenFiles:
    if isinstance(tokenizer, str):
        folder = _folder(corpus, tokenizer, root)
    else:
        # The text of an earlier run is cached under the name of its tokenizer.
        files = _opened(_folder(corpus, tokenizer.name, root), root)
        if files and files.tokenizer and files.tokenizer.to_dict() == tokenizer.to_dict():
            return files
        folder = _folder(corpus, json.dumps(tokenizer.to_dict(), sort_keys=True), root)
    # Folders appear complete or not at all, so reading one needs no lock and works in a read-only cache.
    if files := _opened(folder, root):
        return files
    lock = folder.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(
            f"the cache folder {lock.parent} cannot be written ({error.strerror}); "
            "set LIGHTNING_GPT_CACHE to a folder that can"
        ) from error
    with locked(lock):
        if files := _opened(folder, root):
            return files
        write_corpus(folder, corpus=corpus, plan=Plan(tokenizer=tokenizer, val_fraction=VAL_FRACTION))
        return open_token_files(folder, cache_dir=root)


def _folder(corpus: Corpus, tokenizer: str, root: Path) -> Path:
    digest = hashlib.blake2b(f"{FORMAT_VERSION}\0{VAL_FRACTION}\0{tokenizer}\0".encode(), digest_size=16)
    for block in corpus.joined():
        digest.update(block.data)
    return root / "tokens" / digest.hexdigest()


def _opened(folder: Path, root: Path) -> TokenFiles | None:
    """Open cached token files; None if they are missing or damaged, and must be written again."""
    if folder.exists():
        with contextlib.suppress(UserError):
            return open_token_files(folder, cache_dir=root)
    return None


def _check_lengths(files: TokenFiles, block_size: int) -> None:
    if files.train_tokens < block_size + 1:
        raise UserError(
            f"the training split has {files.train_tokens} tokens, but --block_size {block_size} needs at least "
            f"{block_size + 1}; give more text or a smaller --block_size"
        )
    if files.val_tokens < 2:
        raise UserError(f"the validation split has {files.val_tokens} token, but needs at least 2; give more text")
