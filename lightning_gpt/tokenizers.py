"""Text to token ids and back: by character, by byte, or by GPT-2's byte pairs.

Every tokenizer has the same few methods (see `Tokenizer`) and goes into a file as plain JSON (`to_dict`,
`tokenizer_from_dict`). A new tokenizer is one class and one row in `TOKENIZERS`.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from lightning_gpt.config import UserError


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        name: Its name in `TOKENIZERS` and on the command line.
        vocab_size: How many token ids there are; ids run from 0 to vocab_size - 1.
    """

    name: ClassVar[str]
    vocab_size: int

    @classmethod
    @abstractmethod
    def from_corpus(cls, corpus: bytes | None, *, source: str) -> Tokenizer:
        """Build the tokenizer, from the training text where it depends on one."""

    @classmethod
    @abstractmethod
    def from_dict(cls, fields: dict[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer from what `to_dict` returned."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_tokens,), int64."""

    @abstractmethod
    def encode_bytes(self, data: bytes, *, source: str) -> np.ndarray:
        """Token ids of a whole corpus, shape (n_tokens,), in whatever unsigned type holds them.

        Args:
            data: The corpus as it lies in its file.
            source: What to call the corpus in an error message.

        Raises:
            UserError: The tokenizer needs UTF-8 text and `data` is none, or a character has no token.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids.

        Bytes that are not UTF-8 (a sample may end inside a character) become U+FFFD.

        Raises:
            UserError: An id is not in the vocabulary.
        """

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in JSON's types."""
        return {"name": self.name}

    def _checked(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"token {outside[0]} is not in the {self.name} tokenizer's vocabulary of {self.vocab_size}: "
                "the model was trained with another tokenizer, or too little to avoid unused ids"
            )
        return array


class CharTokenizer(Tokenizer):
    """One token per character of the training text, as in nanoGPT's character-level data sets.

    Args:
        chars: The vocabulary; the token id of a character is its place in this string.

    Raises:
        UserError: The vocabulary is empty or names a character twice.
    """

    name = "char"

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a char tokenizer needs a vocabulary of one or more different characters")
        self.chars = chars
        self.vocab_size = len(chars)
        self._points = _code_points(chars)
        self._ids = np.full(int(self._points.max()) + 1, -1, dtype=np.int32)  # code point -> id
        self._ids[self._points] = np.arange(len(chars))

    @classmethod
    def from_corpus(cls, corpus: bytes | None, *, source: str) -> CharTokenizer:
        """The sorted different characters of a corpus."""
        if corpus is None:
            raise UserError(
                "--tokenizer char takes its vocabulary from a training text and there is none; use --tokenizer byte"
            )
        return cls("".join(sorted(set(_as_text(corpus, source=source)))))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CharTokenizer:
        """Rebuild the tokenizer from what `to_dict` returned."""
        chars = fields.get("chars")
        if not isinstance(chars, str):
            raise UserError("a saved char tokenizer needs a text field 'chars'")
        return cls(chars)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_characters,), int64.

        Raises:
            UserError: A character of the text is not in the vocabulary.
        """
        return self._lookup(text).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str) -> np.ndarray:
        """Token ids of a UTF-8 corpus, shape (n_characters,), uint32."""
        return self._lookup(_as_text(data, source=source)).astype(np.uint32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids, one character each."""
        points = self._points[self._checked(ids)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in JSON's types."""
        return {"name": self.name, "chars": self.chars}

    def _lookup(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        missing = (ids < 0) | (points >= len(self._ids))
        if missing.any():
            char = text[int(missing.argmax())]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not in this tokenizer's vocabulary of {self.vocab_size} "
                "characters; use only characters of the training text, or train with --tokenizer byte"
            )
        return ids


class ByteTokenizer(Tokenizer):
    """One token per byte of the UTF-8 text: 256 tokens, able to hold any data."""

    name = "byte"
    vocab_size = 256

    @classmethod
    def from_corpus(cls, corpus: bytes | None, *, source: str) -> ByteTokenizer:
        """Needs nothing from the corpus."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ByteTokenizer:
        """Needs nothing but its name."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, shape (n_bytes,), int64."""
        # Bytes of the command line that are not UTF-8 reach Python as escaped surrogates: give them back as bytes.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)

    def encode_bytes(self, data: bytes, *, source: str) -> np.ndarray:
        """The bytes themselves, shape (n_bytes,), uint8, read-only and without a copy."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some bytes."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding through tiktoken: 50,257 tokens, the last of them <|endoftext|>.

    The tables are loaded when first needed, so a tokenizer can be stored, sent to another process and asked for its
    size where tiktoken is not installed. Special tokens written out in a text are plain text.
    """

    name = "gpt2"
    vocab_size = 50257

    @classmethod
    def from_corpus(cls, corpus: bytes | None, *, source: str) -> GPT2Tokenizer:
        """Needs nothing from the corpus."""
        return cls()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPT2Tokenizer:
        """Needs nothing but its name."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, shape (n_tokens,), int64.

        Raises:
            UserError: tiktoken is not installed or its tables cannot be had.
        """
        return np.asarray(_gpt2_encoding().encode_ordinary(text), dtype=np.int64)

    def encode_bytes(self, data: bytes, *, source: str, chunk_characters: int = 1 << 20) -> np.ndarray:
        """Token ids of a UTF-8 corpus, shape (n_tokens,), uint16, encoded on all processor cores.

        Args:
            data: The corpus as it lies in its file.
            source: What to call the corpus in an error message.
            chunk_characters: About how much text one thread takes at a time. It does not change the tokens.

        Raises:
            UserError: Not UTF-8, or tiktoken is not installed or its tables cannot be had.
        """
        import os

        from tqdm import tqdm

        encoding = _gpt2_encoding()
        text = _as_text(data, source=source)
        threads = os.cpu_count() or 1
        parts: list[np.ndarray] = []
        with tqdm(total=len(text), desc="tokenizing", unit="char", unit_scale=True, delay=2, disable=None) as bar:
            batch: list[str] = []
            for chunk in _chunks(text, chunk_characters):
                batch.append(chunk)
                if len(batch) == 2 * threads:
                    parts += _encode_batch(encoding, batch, threads)
                    bar.update(sum(map(len, batch)))
                    batch = []
            parts += _encode_batch(encoding, batch, threads)
            bar.update(sum(map(len, batch)))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some token ids.

        Raises:
            UserError: An id is not in the vocabulary, or tiktoken or its tables are missing.
        """
        return _gpt2_encoding().decode(self._checked(ids).tolist(), errors="replace")


TOKENIZERS: dict[str, type[Tokenizer]] = {t.name: t for t in (CharTokenizer, ByteTokenizer, GPT2Tokenizer)}


def build_tokenizer(name: str, *, corpus: bytes | None, source: str) -> Tokenizer:
    """Build a tokenizer by its name.

    Args:
        name: A key of `TOKENIZERS`.
        corpus: The whole training text, or None where there is none; only `char` needs it.
        source: What to call the corpus in an error message.

    Raises:
        UserError: No such tokenizer, or the corpus does not suit it.
    """
    return _tokenizer_class(name).from_corpus(corpus, source=source)


def tokenizer_from_dict(fields: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what its `to_dict` returned.

    Raises:
        UserError: No such tokenizer, or a field is missing or wrong.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
        raise UserError("a saved tokenizer must be a JSON object with a field 'name'")
    return _tokenizer_class(fields["name"]).from_dict(fields)


def _tokenizer_class(name: str) -> type[Tokenizer]:
    if name not in TOKENIZERS:
        raise UserError(f"--tokenizer {name} is not known; choose from {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def _as_text(data: bytes, *, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02X}); "
            "convert it, or use --tokenizer byte"
        ) from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@functools.cache
def _gpt2_encoding() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            "--tokenizer gpt2 needs the package tiktoken: pip install -r requirements/nanogpt.txt"
        ) from None
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError, ImportError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"tiktoken cannot get the gpt2 tables ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that "
            "holds them, or use --tokenizer char"
        ) from error


# GPT-2's pattern cuts a run of white space that is followed by something else before its last character, and nothing
# but white space can hold a newline. So before a newline that has a visible character after it there always is a cut,
# whatever stands around it: encoding the two sides apart gives the same tokens.
_SAFE_CUT = re.compile(r"\n(?=[!-~])")


def _chunks(text: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _encode_batch(encoding: Any, batch: list[str], threads: int) -> list[np.ndarray]:
    return [np.asarray(ids, np.uint16) for ids in encoding.encode_ordinary_batch(batch, num_threads=threads)]
