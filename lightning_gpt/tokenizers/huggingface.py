"""Hugging Face `tokenizer.json` files, through the package tokenizers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.invocation import install_line
from lightning_gpt.parsing import brief, parse_json
from lightning_gpt.tokenizers.base import MAX_VOCAB, Tokenizer, around_gaps, as_text, saved_sizes, without_surrogates
from lightning_gpt.tokenizers.bpe import CUT_BEFORE_NEWLINE, cut_where

_ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`; it keeps the text of the file, which is not needed again.

    Encoding is deterministic: special tokens in a text are encoded as plain text, none are added, and the file's
    truncation, padding and dropout are ignored. Added tokens that are not special are recognised in a text. If the file
    has a normalizer, decoding may not restore the text.

    Args:
        text: Text of the file.
        vocab_size: Largest id plus one; smaller ids may be unused.
        end_of_text: Id of the special token that ends a text, or None.
    """

    name = "huggingface"

    def __init__(self, text: str, *, vocab_size: int, end_of_text: int | None) -> None:
        self.text = text
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> HuggingFaceTokenizer:
        """Read the file that ``--tokenizer`` names; needs no corpus.

        Raises:
            UserError: The package or the file is missing, or the file is not a `tokenizer.json`.
        """
        path = Path(spelling).expanduser()
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"--tokenizer {spelling}: {error.strerror}; give the path of a tokenizer.json") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--tokenizer {spelling} is not UTF-8 text, as a tokenizer.json is") from error
        try:
            ids = _load(text).get_vocab(with_added_tokens=True).values()
        except UserError as error:
            raise UserError(f"--tokenizer {spelling}: {error}") from error
        if not ids:
            raise UserError(f"--tokenizer {spelling} has an empty vocabulary")
        if max(ids) >= MAX_VOCAB:
            raise UserError(f"--tokenizer {spelling} has the token id {max(ids)}; ids are below {MAX_VOCAB:,}")
        special = {token["content"]: token["id"] for token in added_tokens(text) if token["special"]}
        end = next((special[content] for content in _ENDS_OF_TEXT if content in special), None)
        return cls(text, vocab_size=max(ids) + 1, end_of_text=end)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> HuggingFaceTokenizer:
        """Rebuild the tokenizer from the result of `to_dict`."""
        what = "huggingface tokenizer needs 'tokenizer_json', 'vocab_size' and 'end_of_text'"
        text = fields.get("tokenizer_json")
        if not isinstance(text, str):
            raise UserError(f"a saved {what}")
        size, end = saved_sizes(fields, what=what)
        return cls(text, vocab_size=size, end_of_text=end)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, shape (n_tokens,), int64.

        Raises:
            UserError: The vocabulary cannot encode it, or the package tokenizers is not installed.
        """
        return np.asarray(self._ids(without_surrogates(text), source="the text"), dtype=np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Return the token ids of a piece of UTF-8 text, shape (n_tokens,), uint32.

        Raises:
            UserError: The data is not UTF-8, the vocabulary cannot encode it, or the package tokenizers is not
                installed.
        """
        return np.asarray(self._ids(as_text(data, source=source, offset=offset), source=source), dtype=np.uint32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            UserError: An id is not in the vocabulary, or the package tokenizers is not installed.
        """
        tokenizer = _load(self.text)
        tokens = self._checked(ids).tolist()
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
        return around_gaps(tokens, lambda token: tokenizer.id_to_token(token) is not None, decode)

    def cut(self, data: bytes, start: int) -> int | None:
        """Cut as GPT-2's encoding does, if the file splits text in the same way; else return None."""
        return cut_where(CUT_BEFORE_NEWLINE, data, start) if _splits_as_gpt2(self.text) else None

    def answers_to(self, spelling: str) -> bool:
        """Return whether this value of ``--tokenizer`` is a file with the same text, or one that no longer exists."""
        path = Path(spelling).expanduser()
        return is_path(spelling) and (not path.is_file() or path.read_bytes() == self.text.encode("utf-8"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, in JSON types."""
        numbers = {"vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {"name": self.name, "tokenizer_json": self.text, **numbers}

    def _ids(self, text: str, *, source: str) -> list[int]:
        tokenizer = _load(self.text)
        try:
            # The library releases the GIL only for batches.
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the tokenizer.json has no tokens for {source} ({error})") from error


def is_path(spelling: str) -> bool:
    """Return whether a value of ``--tokenizer`` is a path instead of a name."""
    return spelling.endswith(".json") or "/" in spelling or os.sep in spelling


@functools.lru_cache(maxsize=4)
def _load(text: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"a Hugging Face tokenizer needs the package tokenizers: {install_line('huggingface')}"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are not Exceptions
        raise UserError(f"not a readable Hugging Face tokenizer.json ({brief(error)})") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def added_tokens(text: str) -> list[dict[str, Any]]:
    """Return the added tokens of a `tokenizer.json`, each with at least `id`, `content` and `special`.

    Raises:
        UserError: The text is damaged.
    """
    fields = parse_json(text, source="the tokenizer.json")
    added = (fields.get("added_tokens") or []) if isinstance(fields, dict) else None
    needed = {"id", "content", "special"}
    if not isinstance(added, list) or not all(isinstance(token, dict) and needed <= token.keys() for token in added):
        raise UserError("the tokenizer.json has no list of added_tokens")
    return added


@functools.lru_cache(maxsize=4)
def _splits_as_gpt2(text: str) -> bool:
    """Return whether only GPT-2's pattern splits text, without a normalizer or added tokens before it."""
    fields = parse_json(text, source="the tokenizer.json")
    splitter = fields.get("pre_tokenizer")
    return (
        isinstance(splitter, dict)
        and fields.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space", True)
        and all(token["special"] for token in added_tokens(text))
    )
