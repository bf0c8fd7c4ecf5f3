"""How a tokenized corpus lies on disk.

A token folder holds `train.bin` and `val.bin`, raw little-endian token ids of 2 bytes (vocabularies of up to 65,536
tokens) or 4, and `meta.json`, which says how to read them. nanoGPT's folders, with `meta.pkl` or with no description
at all, open as well.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.tokens.writing import SPLITS, Split, TokenWriter
from lightning_gpt.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_dict

if TYPE_CHECKING:
    from lightning_gpt.data.streams import EvalBatches, TokenStream

FORMAT_VERSION = 1
_BYTES_PER_TOKEN = {"uint16": 2, "uint32": 4}
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class TokenFiles:
    """An opened token folder; holds no file open, so it can be sent to another process.

    Attributes:
        folder: Where the files lie.
        dtype: "uint16" or "uint32".
        vocab_size: Every token id is below it.
        tokenizer: What made the tokens, or None where the folder does not say.
        source: What text it was.
        train_tokens: Tokens in `train.bin`.
        val_tokens: Tokens in `val.bin`.
        train_bytes: Size of the training text in UTF-8, or None where unknown.
        val_bytes: Size of the validation text in UTF-8, or None where unknown.
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
        """The file of a split."""
        return self.folder / f"{split}.bin"

    def n_tokens(self, split: Split) -> int:
        """How many tokens a split has."""
        return {"train": self.train_tokens, "val": self.val_tokens}[split]

    def n_bytes(self, split: Split) -> int | None:
        """Size of a split's text in UTF-8, or None where unknown."""
        return {"train": self.train_bytes, "val": self.val_bytes}[split]

    def tokens(self, split: Split) -> np.memmap:
        """A fresh read-only memory map of a split, shape (n_tokens,), uint16 or uint32."""
        return _memory_map(self.path(split), self.dtype)

    def opener(self, split: Split) -> Callable[[], np.ndarray]:
        """What the streams take: a picklable function that maps a split into memory when it is called."""
        return functools.partial(_memory_map, self.path(split), self.dtype)

    def describe(self) -> str:
        """The text and its length, for people."""
        return f"{self.source}: {self.train_tokens:,} training and {self.val_tokens:,} validation tokens"

    def train_stream(self, *, block_size: int, seed: int) -> TokenStream:
        """Endless windows of the training split, of `block_size` inputs each."""
        from lightning_gpt.data.streams import TokenStream  # imports torch, which writing tokens need not wait for

        return TokenStream(self.opener("train"), n_tokens=self.train_tokens, block_size=block_size, seed=seed)

    def val_pass(self, *, block_size: int, stride: int | None = None, **share: Any) -> EvalBatches:
        """A rank's share of the validation split; `share` are the arguments of EvalPass."""
        from lightning_gpt.data.streams import EvalBatches

        return EvalBatches(self.opener("val"), n_tokens=self.val_tokens, block_size=block_size, stride=stride, **share)


def is_token_folder(folder: Path) -> bool:
    """Whether a folder holds token files, perhaps not all of them."""
    return any(os.path.isfile(folder / f"{split}.bin") for split in SPLITS)


def token_dtype(vocab_size: int) -> str:
    """What a token is stored in: "uint16" for up to 65,536 symbols, "uint32" for more."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def describe(
    *,
    n_tokens: dict[Split, int],
    n_bytes: dict[Split, int | None],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    source: str,
) -> dict[str, Any]:
    """The content of `meta.json`.

    Args:
        n_tokens: Tokens of each split.
        n_bytes: Size of each split's text in UTF-8, None where unknown.
        tokenizer: What made the tokens, or None where unknown.
        vocab_size: Every token id is below it.
        source: What text it was.
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
    """Write a token folder from arrays; either all of it appears or nothing does.

    Args:
        folder: Where to; it may exist if it is empty or holds token files only, which are then replaced.
        train: Token ids of the training split, shape (n_tokens,), any integer type.
        val: Token ids of the validation split, likewise.
        tokenizer: What made them, or None where unknown.
        vocab_size: Decides whether a token takes 2 bytes or 4.
        source: What text it was.
        train_bytes: Size of the training text in UTF-8, or None where unknown.
        val_bytes: Size of the validation text in UTF-8, or None where unknown.

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
    """Open a token folder and check it: sizes, counts, and that every token is in the vocabulary.

    The last needs all tokens read once; that it went well is noted in the cache, so the next start is fast.

    Args:
        folder: A folder with `train.bin`, `val.bin` and `meta.json`, or nanoGPT's with `meta.pkl` or neither (then
            the tokens are taken for GPT-2's).
        cache_dir: The cache folder; None means `cache_root()`.

    Raises:
        UserError: A file is missing, empty, damaged or does not fit the others.
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
        vocab_size, tokenizer = _read_meta_pickle(folder / "meta.pkl")
    else:
        tokenizer = GPT2Tokenizer()
        vocab_size = tokenizer.vocab_size
    return _describe(folder, dtype="uint16", vocab_size=vocab_size, tokenizer=tokenizer, source=str(folder))


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _memory_map(path: Path, dtype: str) -> np.memmap:
    return np.memmap(path, dtype=_little_endian(dtype), mode="r")


def _describe(folder: Path, *, dtype: str, **fields: Any) -> TokenFiles:
    counts = {}
    for split in SPLITS:
        size, width = (folder / f"{split}.bin").stat().st_size, _BYTES_PER_TOKEN[dtype]
        if size == 0:
            raise UserError(f"{folder}: {split}.bin is empty")
        if size % width:
            raise UserError(f"{folder}: {split}.bin has {size} bytes, not a whole number of {width}-byte tokens")
        counts[f"{split}_tokens"] = size // width
    for name in ("train_bytes", "val_bytes"):
        fields.setdefault(name, None)
    return TokenFiles(folder=folder, dtype=dtype, **counts, **fields)


def _read_meta_json(folder: Path) -> TokenFiles:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} does not describe token files of format {FORMAT_VERSION}; prepare the data again")
    if meta.get("dtype") not in _BYTES_PER_TOKEN:
        raise UserError(f"{path}: dtype is {meta.get('dtype')!r}, it must be one of {', '.join(_BYTES_PER_TOKEN)}")
    for name in ("train_bytes", "val_bytes"):
        if meta.get(name) is not None and not _is_count(meta[name]):
            raise UserError(f"{path}: {name} is {meta[name]!r}, it must be a positive whole number or null")
    if not _is_count(meta.get("vocab_size")):
        raise UserError(f"{path}: vocab_size is {meta.get('vocab_size')!r}, it must be a positive whole number")
    stored = meta.get("tokenizer")
    files = _describe(
        folder,
        dtype=meta["dtype"],
        vocab_size=meta["vocab_size"],
        tokenizer=None if stored is None else tokenizer_from_dict(stored),
        source=str(meta.get("source")),
        train_bytes=meta.get("train_bytes"),
        val_bytes=meta.get("val_bytes"),
    )
    for split in SPLITS:
        if files.n_tokens(split) != meta.get(f"{split}_tokens"):
            raise UserError(
                f"{folder}: {split}.bin has {files.n_tokens(split)} tokens, but meta.json says "
                f"{meta.get(f'{split}_tokens')}; prepare the data again"
            )
    return files


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, texts and numbers only: a pickle that names a class or function could run anything."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")


def _read_meta_pickle(path: Path) -> tuple[int, Tokenizer | None]:
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is refused: {error}; only a pickle of plain dictionaries is read") from error
    if not isinstance(meta, dict) or not _is_count(meta.get("vocab_size")):
        raise UserError(f"{path} has no vocab_size that is a positive whole number")
    vocab_size, itos = meta["vocab_size"], meta.get("itos")
    if not isinstance(itos, dict) or len(itos) != vocab_size:
        return vocab_size, None
    chars = [itos.get(token) for token in range(vocab_size)]
    if not all(isinstance(char, str) and len(char) == 1 for char in chars) or len(set(chars)) != vocab_size:
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
    with contextlib.suppress(OSError):  # the stamp only saves time
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
