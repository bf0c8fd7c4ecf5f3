"""The token folder format: open, check and write it.

A token folder holds `train.bin` and `val.bin`, raw little-endian token ids of 2 bytes (vocabularies of up to 65,536
tokens) or 4 bytes, and `meta.json`, which describes them. nanoGPT's folders, with `meta.pkl` or no description, can be
opened too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.tokens.mapping import TokenFile
from lightning_gpt.data.tokens.writing import SPLITS, Split, TokenWriter
from lightning_gpt.parsing import StrictUnpickler, brief, read_json, shown
from lightning_gpt.tokenizers import MAX_VOCAB, CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_dict

FORMAT_VERSION = 1
_BYTES_PER_TOKEN = {"uint16": 2, "uint32": 4}
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class TokenFiles:
    """A checked token folder; picklable, because it keeps no file open.

    Attributes:
        folder: The token folder.
        dtype: "uint16" or "uint32".
        vocab_size: Upper bound of the token ids, exclusive.
        tokenizer: The tokenizer that made the tokens, or None if unknown.
        source: Name of the text, for messages.
        train_tokens: Number of tokens in `train.bin`.
        val_tokens: Number of tokens in `val.bin`.
        train_bytes: Size of the training text in UTF-8, or None if unknown.
        val_bytes: Size of the validation text in UTF-8, or None if unknown.
    """

    folder: Path
    dtype: str
    vocab_size: int
    tokenizer: Tokenizer | None
    source: str
    train_tokens: int
    val_tokens: int
    train_bytes: int | None
    val_bytes: int | None

    def path(self, split: Split) -> Path:
        """Return the path of a split's file."""
        return self.folder / f"{split}.bin"

    def n_tokens(self, split: Split) -> int:
        """Return the number of tokens in a split."""
        return {"train": self.train_tokens, "val": self.val_tokens}[split]

    def n_bytes(self, split: Split) -> int | None:
        """Return the size of a split's text in UTF-8: as recorded, or counted if tokens are characters; else None."""
        recorded = {"train": self.train_bytes, "val": self.val_bytes}[split]
        if recorded is not None or not isinstance(self.tokenizer, CharTokenizer):
            return recorded
        widths = np.array([len(char.encode("utf-8", "surrogatepass")) for char in self.tokenizer.chars])
        tokens = self.tokens(split)
        return sum(int(widths[tokens[at : at + _SCAN_TOKENS]].sum()) for at in range(0, len(tokens), _SCAN_TOKENS))

    def tokens(self, split: Split) -> np.memmap:
        """Map a split into memory, read-only: shape (n_tokens,), uint16 or uint32."""
        return np.memmap(self.path(split), dtype=_little_endian(self.dtype), mode="r")

    def opener(self, split: Split) -> Callable[[], np.ndarray]:
        """Return a picklable function that maps a split into memory, as the streams expect; it keeps the file open."""
        return TokenFile(self.path(split), dtype=_little_endian(self.dtype), n_tokens=self.n_tokens(split))

    def describe(self) -> str:
        """Return one line about the text and its length."""
        return f"{self.source}: {self.train_tokens:,} training and {self.val_tokens:,} validation tokens"


def is_token_folder(folder: Path) -> bool:
    """Return whether a folder holds train.bin or val.bin."""
    return any(os.path.isfile(folder / f"{split}.bin") for split in SPLITS)


def token_dtype(vocab_size: int) -> str:
    """Return the dtype of stored tokens: "uint16" for up to 65,536 symbols, else "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def describe(
    *,
    n_tokens: Mapping[Split, int],
    n_bytes: Mapping[Split, int | None],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    source: str,
) -> dict[str, Any]:
    """Return the content of `meta.json`.

    Args:
        n_tokens: Number of tokens in each split.
        n_bytes: Size of each split's text in UTF-8, or None if unknown.
        tokenizer: The tokenizer that made the tokens, or None if unknown.
        vocab_size: Upper bound of the token ids, exclusive.
        source: Name of the text, for messages.
    """
    return {
        "format": FORMAT_VERSION,
        "dtype": token_dtype(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.to_dict() if tokenizer else None,
        "source": source,
        **{f"{split}_tokens": n_tokens[split] for split in SPLITS},
        **{f"{split}_bytes": n_bytes[split] for split in SPLITS},
    }


def write_token_files(
    folder: Path,
    *,
    train: np.ndarray,
    val: np.ndarray,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    source: str,
    train_bytes: int | None = None,
    val_bytes: int | None = None,
) -> None:
    """Write a token folder from arrays; it appears complete or not at all.

    Args:
        folder: The folder to create; an existing one must be empty or hold only token files, which are replaced.
        train: Token ids of the training split, shape (n_tokens,), any integer dtype.
        val: Token ids of the validation split, shape (n_tokens,), any integer dtype.
        tokenizer: The tokenizer that made them, or None if unknown.
        vocab_size: Upper bound of the token ids, exclusive; decides whether a token takes 2 or 4 bytes.
        source: Name of the text, for messages.
        train_bytes: Size of the training text in UTF-8, or None if unknown.
        val_bytes: Size of the validation text in UTF-8, or None if unknown.

    Raises:
        UserError: The folder holds other files, or cannot be written.
    """
    splits: dict[Split, np.ndarray] = {"train": train, "val": val}
    dtype = _little_endian(token_dtype(vocab_size))
    n_tokens: dict[Split, int] = {split: len(tokens) for split, tokens in splits.items()}
    n_bytes: dict[Split, int | None] = {"train": train_bytes, "val": val_bytes}
    meta = describe(n_tokens=n_tokens, n_bytes=n_bytes, tokenizer=tokenizer, vocab_size=vocab_size, source=source)
    try:
        with TokenWriter(folder, job={}, keep=False) as writer:
            for split, tokens in splits.items():
                for start in range(0, len(tokens), _SCAN_TOKENS):
                    writer.append(split, tokens[start : start + _SCAN_TOKENS].astype(dtype).tobytes())
            writer.publish(meta)
    except OSError as error:
        raise UserError(f"cannot write the token files {folder}: {error.strerror}") from error


def open_token_files(folder: Path, *, cache_dir: Path | None = None) -> TokenFiles:
    """Open a token folder and check it: file sizes, token counts, and that every token is in the vocabulary.

    The vocabulary check reads all tokens once and leaves a stamp in the cache, so the next start skips it.

    Args:
        folder: A folder with `train.bin`, `val.bin` and `meta.json`, or nanoGPT's with `meta.pkl` or no description;
            without a description, the tokens are assumed to be GPT-2's.
        cache_dir: The cache folder; None means `cache_root()`.

    Raises:
        UserError: A file is missing, empty or damaged, or contradicts another.
    """
    for split in SPLITS:
        if not (folder / f"{split}.bin").is_file():
            raise UserError(f"{folder} has no {split}.bin; a token folder needs train.bin and val.bin")
    try:
        files = _read_meta(folder)
        for split in SPLITS:
            _check_vocabulary(files, split, cache_dir=cache_dir or cache_root())
    except OSError as error:
        raise UserError(f"cannot read the token files {folder}: {error.strerror}") from error
    return files


def _read_meta(folder: Path) -> TokenFiles:
    if (folder / "meta.json").is_file():
        return _read_meta_json(folder)
    if (folder / "meta.pkl").is_file():
        vocab_size, tokenizer = read_meta_pickle(folder / "meta.pkl")
    else:
        vocab_size, tokenizer = GPT2Tokenizer.vocab_size, GPT2Tokenizer()
    return _token_files(folder, dtype="uint16", vocab_size=vocab_size, tokenizer=tokenizer, source=str(folder))


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _token_files(folder: Path, *, dtype: str, **fields: Any) -> TokenFiles:
    for split in SPLITS:
        size, width = (folder / f"{split}.bin").stat().st_size, _BYTES_PER_TOKEN[dtype]
        if size == 0:
            raise UserError(f"{folder}: {split}.bin is empty")
        if size % width:
            raise UserError(f"{folder}: {split}.bin has {size} bytes, not a whole number of {width}-byte tokens")
        fields[f"{split}_tokens"] = size // width
        fields.setdefault(f"{split}_bytes", None)
    return TokenFiles(folder=folder, dtype=dtype, **fields)


def _read_meta_json(folder: Path) -> TokenFiles:
    path = folder / "meta.json"
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} does not describe token files of format {FORMAT_VERSION}; prepare the data again")
    if meta.get("dtype") not in list(_BYTES_PER_TOKEN):
        raise UserError(f"{path}: dtype is {shown(meta.get('dtype'))}, it must be one of {', '.join(_BYTES_PER_TOKEN)}")
    for name in ("train_bytes", "val_bytes"):
        if meta.get(name) is not None and not _is_count(meta[name]):
            raise UserError(f"{path}: {name} is {shown(meta[name])}, it must be a positive whole number or null")
    if not _is_count(meta.get("vocab_size"), most=MAX_VOCAB):
        size = shown(meta.get("vocab_size"))
        raise UserError(f"{path}: vocab_size is {size}, it must be a positive whole number up to {MAX_VOCAB:,}")
    stored = meta.get("tokenizer")
    files = _token_files(
        folder,
        dtype=meta["dtype"],
        vocab_size=meta["vocab_size"],
        tokenizer=None if stored is None else tokenizer_from_dict(stored),
        source=str(meta.get("source"))[:1000],
        train_bytes=meta.get("train_bytes"),
        val_bytes=meta.get("val_bytes"),
    )
    for split in SPLITS:
        if files.n_tokens(split) != meta.get(f"{split}_tokens"):
            raise UserError(
                f"{folder}: {split}.bin has {files.n_tokens(split)} tokens, but meta.json says "
                f"{shown(meta.get(f'{split}_tokens'))}; prepare the data again"
            )
    return files


def _is_count(value: Any, *, most: int = 2**63) -> bool:
    return type(value) is int and 0 < value <= most


def read_meta_pickle(path: Path) -> tuple[int, Tokenizer | None]:
    """Return the vocabulary size in nanoGPT's ``meta.pkl``, and the tokenizer; None unless tokens are characters.

    Raises:
        UserError: The file is damaged, or holds anything else than plain dictionaries.
    """
    try:
        meta = StrictUnpickler(path).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is refused: {brief(error)}; only a pickle of plain dictionaries is read") from error
    if not isinstance(meta, dict) or not _is_count(meta.get("vocab_size"), most=MAX_VOCAB):
        raise UserError(f"{path} has no vocab_size that is a positive whole number up to {MAX_VOCAB:,}")
    vocab_size, itos = meta["vocab_size"], meta.get("itos")
    if not isinstance(itos, dict) or len(itos) != vocab_size:
        return vocab_size, None
    values = [itos.get(token) for token in range(vocab_size)]
    chars = [char for char in values if isinstance(char, str) and len(char) == 1]
    if len(set(chars)) != vocab_size:
        return vocab_size, None
    return vocab_size, CharTokenizer("".join(chars))


def _check_vocabulary(files: TokenFiles, split: Split, *, cache_dir: Path) -> None:
    if files.vocab_size > np.iinfo(files.dtype).max:
        return
    path = files.path(split).resolve()
    stat = path.stat()
    key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{files.dtype}\0{files.vocab_size}"
    stamp = cache_dir / "checked" / hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
    if stamp.exists():
        return
    tokens = files.tokens(split)
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        if chunk.max() >= files.vocab_size:
            at = int((chunk >= files.vocab_size).argmax())
            raise UserError(
                f"{files.folder}: {split}.bin holds token {chunk[at]} at position {start + at}, "
                f"but the vocabulary has {files.vocab_size} symbols"
            )
    with contextlib.suppress(OSError):  # without the stamp, the next run checks again
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
