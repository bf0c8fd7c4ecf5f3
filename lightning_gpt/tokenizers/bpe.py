"""Byte-pair encodings of OpenAI's, through tiktoken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import Tokenizer, around_gaps, as_text
from lightning_gpt.tokenizers.tables import keep_tables, load_encoding

# An encoding splits a text into pieces by a regular expression, left to right and without looking back, and encodes
# each piece by itself. So it may be cut where a piece of the whole ends, if the left side alone has the same pieces.
#
# GPT-2's pattern (r50k, p50k): only pieces of white space hold a newline. A run of white space that a visible
# character follows is cut before its last character, which makes a piece by itself: `\s+(?!\S)` takes all but the
# last, `\s` takes that. So before a newline that a visible character follows a piece ends. On the left side alone the
# rest of the run, if there is any, is the end of the text, and `\s++$` takes the same characters.
CUT_BEFORE_NEWLINE = re.compile(rb"(?=\n[!-~])")
# cl100k, o200k: a newline is in a piece of white space, which `\s*[\r\n]` ends after the last newline of its run, or
# at the end of a piece of punctuation, ` ?[^\s\p{L}\p{N}]+[\r\n]*`, which takes all newlines that follow. What has no
# white space behind the newline but a visible character, ends there. On the left side alone the run is the end of
# the text, and `\s++$` or `\s*[\r\n]` takes the same characters; `(?!\S)` is asked only of runs without a newline. A
# slash may go on with o200k's punctuation after a newline, so none may follow.
_CUT_AFTER_NEWLINE = re.compile(rb"(?<=\n)(?=[!-.0-~])")
_CUTS = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), CUT_BEFORE_NEWLINE),
    **dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), _CUT_AFTER_NEWLINE),
}


def cut_where(rule: re.Pattern[bytes], data: bytes, start: int) -> int | None:
    """The first place of `data` from `start` on, but not its beginning, where a rule of no width matches."""
    found = rule.search(data, max(start, 1))
    return found.start() if found else None


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings.

    The tables are loaded when first needed, so a tokenizer can be stored, sent to another process and asked for its
    size where tiktoken is not installed. Special tokens written out in a text are plain text.

    Args:
        name: The encoding's name.
        vocab_size: One more than its largest id, special tokens included; an id below it may be unused.
        end_of_text: Id of ``<|endoftext|>``, or None.
    """

    def __init__(self, name: str, *, vocab_size: int, end_of_text: int | None) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> TiktokenTokenizer:
        """Needs nothing from the corpus, but the tables, for the numbers."""
        encoding = load_encoding(spelling)
        has_end = "<|endoftext|>" in encoding.special_tokens_set
        return cls(spelling, vocab_size=encoding.n_vocab, end_of_text=encoding.eot_token if has_end else None)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TiktokenTokenizer:
        """Rebuild the tokenizer from what `to_dict` returned."""
        name, size, end = (fields.get(key) for key in ("encoding", "vocab_size", "end_of_text"))
        if not isinstance(name, str) or type(size) is not int or size < 1 or (end is not None and type(end) is not int):
            raise UserError("a saved tiktoken tokenizer needs 'encoding', 'vocab_size' and 'end_of_text'")
        return cls(name, vocab_size=size, end_of_text=end)

    @classmethod
    def keep_tables(cls, spelling: str, path: str) -> None:
        """Put the tables of ``--tokenizer_file`` into our cache."""
        keep_tables(spelling, path)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_tokens,), int64.

        Raises:
            UserError: tiktoken is not installed or its tables cannot be had.
        """
        return np.asarray(load_encoding(self.name).encode_ordinary(text), dtype=np.int64)

    def encode_bytes(self, data: bytes, *, source: str, offset: int = 0) -> np.ndarray:
        """Token ids of a piece of UTF-8 text, shape (n_tokens,), uint32.

        Raises:
            UserError: Not UTF-8, or tiktoken is not installed or its tables cannot be had.
        """
        text = as_text(data, source=source, offset=offset)
        # The same tokens as encode_ordinary's, without a Python integer for each.
        return load_encoding(self.name).encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids.

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
        """At the newline between two lines, the second of which begins with a visible ASCII character."""
        rule = _CUTS.get(self.name)
        return cut_where(rule, data, start) if rule else None

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in JSON's types."""
        numbers = {"vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {"name": "tiktoken", "encoding": self.name, **numbers}


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's encoding: 50,257 tokens, the last of them <|endoftext|>; saved by its name alone."""

    vocab_size = 50257

    def __init__(self) -> None:
        super().__init__("gpt2", vocab_size=self.vocab_size, end_of_text=50256)

    @classmethod
    def build(cls, spelling: str, *, corpus: bytes | None, source: str) -> GPT2Tokenizer:
        """Needs nothing from the corpus, and no tables yet."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPT2Tokenizer:
        """Needs nothing but its name."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}


def _is_known(encoding: Any, token: int) -> bool:
    try:
        encoding.decode_single_token_bytes(token)
    except KeyError:
        return False
    return True
