"""OpenAI's byte-pair encodings, through tiktoken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import Tokenizer, around_gaps, as_text, saved_sizes
from lightning_gpt.tokenizers.tables import keep_tables, load_encoding

# An encoding splits text into pieces by a regular expression, left to right without lookbehind, and encodes each piece
# by itself. A cut is therefore safe where a piece of the whole text ends and the left side alone has the same pieces.
#
# GPT-2's pattern (r50k, p50k): only pieces of white space contain a newline. A run of white space before a visible
# character is split before its last character: `\s+(?!\S)` matches all but the last, `\s` matches the last. So a piece
# ends before a newline that a visible character follows. On the left side alone the rest of the run is the end of the
# text, and `\s++$` matches the same characters.
CUT_BEFORE_NEWLINE = re.compile(rb"(?=\n[!-~])")
# cl100k, o200k: a newline is in a piece of white space, which `\s*[\r\n]` ends after the run's last newline, or at the
# end of a piece of punctuation, ` ?[^\s\p{L}\p{N}]+[\r\n]*`, which matches all newlines that follow. So a piece ends
# after a newline that a visible character follows. On the left side alone the run is the end of the text, and `\s++$`
# or `\s*[\r\n]` matches the same characters; `(?!\S)` applies only to runs without a newline. A slash can continue
# o200k's punctuation after a newline, so it is excluded.
_CUT_AFTER_NEWLINE = re.compile(rb"(?<=\n)(?=[!-.0-~])")
_CUTS = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), CUT_BEFORE_NEWLINE),
    **dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), _CUT_AFTER_NEWLINE),
}


def cut_where(rule: re.Pattern[bytes], data: bytes, start: int) -> int | None:
    """Return the first offset from `start` on, and above 0, where a zero-width rule matches; None if there is none."""
    found = rule.search(data, max(start, 1))
    return found.start() if found else None


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding.

    The tables are loaded on first use, so saving, pickling and `vocab_size` do not need tiktoken. Special tokens in a
    text are encoded as plain text.

    Args:
        name: Name of the encoding.
        vocab_size: Largest id, special tokens included, plus one; smaller ids may be unused.
        end_of_text: Id of ``<|endoftext|>``, or None.
    """

    def __init__(self, name: str, *, vocab_size: int, end_of_text: int | None) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> TiktokenTokenizer:
        """Build the encoding, whose tables are loaded for the size of the vocabulary."""
        encoding = load_encoding(spelling)
        has_end = "<|endoftext|>" in encoding.special_tokens_set
        return cls(spelling, vocab_size=encoding.n_vocab, end_of_text=encoding.eot_token if has_end else None)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TiktokenTokenizer:
        """Rebuild the tokenizer from the result of `to_dict`."""
        what = "tiktoken tokenizer needs 'encoding', 'vocab_size' and 'end_of_text'"
        name = fields.get("encoding")
        if not isinstance(name, str):
            raise UserError(f"a saved {what}")
        size, end = saved_sizes(fields, what=what)
        return cls(name, vocab_size=size, end_of_text=end)

    @classmethod
    def keep_tables(cls, spelling: str, path: str) -> None:
        """Check the tables of ``--tokenizer_file`` and copy them to the cache folder for later runs."""
        keep_tables(spelling, path)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, shape (n_tokens,), int64.

        Raises:
            UserError: tiktoken or its tables are missing.
        """
        return np.asarray(load_encoding(self.name).encode_ordinary(text), dtype=np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Return the token ids of a piece of UTF-8 text, shape (n_tokens,), uint32.

        Raises:
            UserError: The data is not UTF-8, or tiktoken or its tables are missing.
        """
        text = as_text(data, source=source, offset=offset)
        # The same tokens as encode_ordinary, without a Python integer for each one.
        return load_encoding(self.name).encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids.

        Raises:
            UserError: An id is not in the vocabulary, or tiktoken or its tables are missing.
        """
        encoding = load_encoding(self.name)
        tokens = self._checked(ids).tolist()
        try:
            return encoding.decode(tokens, errors="replace")
        except KeyError:
            return around_gaps(tokens, partial(_is_known, encoding), partial(encoding.decode, errors="replace"))

    def cut(self, data: bytes, start: int) -> int | None:
        """Cut at a newline before a visible ASCII character."""
        rule = _CUTS.get(self.name)
        return cut_where(rule, data, start) if rule else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the tokenizer, in JSON types."""
        numbers = {"vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {"name": "tiktoken", "encoding": self.name, **numbers}


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's encoding: 50,257 tokens, the last one <|endoftext|>; saved as its name."""

    vocab_size = 50257

    def __init__(self) -> None:
        super().__init__("gpt2", vocab_size=self.vocab_size, end_of_text=50256)

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> GPT2Tokenizer:
        """Build the tokenizer; needs neither corpus nor tables."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPT2Tokenizer:
        """Rebuild the tokenizer; needs only the name."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": self.name}


def _is_known(encoding: Any, token: int) -> bool:
    try:
        encoding.decode_single_token_bytes(token)
    except KeyError:
        return False
    return True
