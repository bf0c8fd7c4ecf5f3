"""Text to token ids and back: by character, by byte, by a tiktoken encoding, or by a Hugging Face tokenizer.json.

Every tokenizer has the same few methods (see `Tokenizer`) and is saved as plain JSON (`to_dict`,
`tokenizer_from_dict`). To add a tokenizer, write one class and add one row to `TOKENIZERS`.
"""

from __future__ import annotations

from typing import Any

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import MAX_VOCAB, Tokenizer
from lightning_gpt.tokenizers.bpe import GPT2Tokenizer, TiktokenTokenizer
from lightning_gpt.tokenizers.huggingface import HuggingFaceTokenizer, is_path
from lightning_gpt.tokenizers.simple import ByteTokenizer, CharTokenizer
from lightning_gpt.tokenizers.tables import encoding_names

__all__ = [
    "MAX_VOCAB",
    "TOKENIZERS",
    "ByteTokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "HuggingFaceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "keep_tables",
    "resolve_tokenizer",
    "tokenizer_from_dict",
]

# Keyed by the name in the saved form; those in `_BY_NAME` have the same name on the command line.
TOKENIZERS: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "gpt2": GPT2Tokenizer,
    "tiktoken": TiktokenTokenizer,
    "huggingface": HuggingFaceTokenizer,
}
_BY_NAME = ("char", "byte", "gpt2")


def build_tokenizer(spelling: str, *, corpus: bytes | None, source: str) -> Tokenizer:
    """Build the tokenizer that ``--tokenizer`` names.

    Args:
        spelling: char, byte, gpt2, another tiktoken encoding, or the path of a Hugging Face tokenizer.json.
        corpus: The whole training text, or None; only `char` needs it.
        source: Name of the corpus for error messages.

    Raises:
        UserError: The tokenizer is unknown, needs a missing package or file, or cannot encode the corpus.
    """
    return _class_of(spelling).build(spelling, corpus=corpus, source=source)


def resolve_tokenizer(spelling: str) -> str | Tokenizer:
    """Return a known name unchanged; for a path, return the tokenizer in that file.

    Raises:
        UserError: The name is unknown, or the file is not a tokenizer.json.
    """
    kind = _class_of(spelling)
    return kind.build(spelling, corpus=None, source=spelling) if is_path(spelling) else spelling


def keep_tables(tokenizer: str | Tokenizer, path: str) -> None:
    """Check the tables of ``--tokenizer_file`` and copy them to the cache folder for later runs.

    Args:
        tokenizer: A tokenizer, or the value of ``--tokenizer``.
        path: The table file, or a folder of table files.

    Raises:
        UserError: The tokenizer has no tables, or these are not its tables.
    """
    if isinstance(tokenizer, str):
        _class_of(tokenizer).keep_tables(tokenizer, path)
    else:
        tokenizer.keep_tables(tokenizer.name, path)


def tokenizer_from_dict(fields: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from the result of its `to_dict`.

    Raises:
        UserError: The tokenizer is unknown, or a field is missing or wrong.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
        raise UserError("a saved tokenizer must be a JSON object with a field 'name'")
    if fields["name"] not in TOKENIZERS:
        raise UserError(f"a saved tokenizer {fields['name'][:99]} is not known; choose from {', '.join(TOKENIZERS)}")
    return TOKENIZERS[fields["name"]].from_dict(fields)


def _class_of(spelling: str) -> type[Tokenizer]:
    if spelling in _BY_NAME:
        return TOKENIZERS[spelling]
    if is_path(spelling):
        return HuggingFaceTokenizer
    others = encoding_names()
    if spelling in others:
        return TiktokenTokenizer
    also = ", ".join(name for name in others if name not in _BY_NAME) or "another encoding (with tiktoken installed)"
    names = ", ".join((*_BY_NAME, also))
    raise UserError(f"--tokenizer {spelling} is not known; choose from {names}, or give the path of a tokenizer.json")
