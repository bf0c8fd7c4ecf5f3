"""Text to token ids and back: by character, by byte, by tiktoken's encodings, or as a Hugging Face file says.

Every tokenizer has the same few methods (see `Tokenizer`) and goes into a file as plain JSON (`to_dict`,
`tokenizer_from_dict`). A new tokenizer is one class and one row in `TOKENIZERS`.
"""

from __future__ import annotations

from typing import Any

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers.base import Tokenizer
from lightning_gpt.tokenizers.bpe import GPT2Tokenizer, TiktokenTokenizer
from lightning_gpt.tokenizers.huggingface import HuggingFaceTokenizer, is_path
from lightning_gpt.tokenizers.simple import ByteTokenizer, CharTokenizer
from lightning_gpt.tokenizers.tables import encoding_names

__all__ = [
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

# By the name in a saved form. Those of `_BY_NAME` go by it on the command line too.
TOKENIZERS: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "gpt2": GPT2Tokenizer,
    "tiktoken": TiktokenTokenizer,
    "huggingface": HuggingFaceTokenizer,
}
_BY_NAME = ("char", "byte", "gpt2")


def build_tokenizer(spelling: str, *, corpus: bytes | None, source: str) -> Tokenizer:
    """Build what ``--tokenizer`` names.

    Args:
        spelling: char, byte, gpt2, another of tiktoken's encodings, or the path of a Hugging Face tokenizer.json.
        corpus: The whole training text, or None where there is none; only `char` needs it.
        source: What to call the corpus in an error message.

    Raises:
        UserError: No such tokenizer, a package or a file that it needs is missing, or the corpus does not suit it.
    """
    return _class_of(spelling).build(spelling, corpus=corpus, source=source)


def resolve_tokenizer(spelling: str) -> str | Tokenizer:
    """A name that is known, as it is; for a path, the tokenizer in that file.

    Raises:
        UserError: No such name, or no tokenizer in the file.
    """
    kind = _class_of(spelling)
    return kind.build(spelling, corpus=None, source=spelling) if is_path(spelling) else spelling


def keep_tables(tokenizer: str | Tokenizer, path: str) -> None:
    """Put the tables of ``--tokenizer_file`` into our cache, where they are found from now on, after a check.

    Args:
        tokenizer: A tokenizer, or what ``--tokenizer`` names.
        path: The file, or a folder with the files.

    Raises:
        UserError: The tokenizer has no tables of its own, or these are not the right ones.
    """
    if isinstance(tokenizer, str):
        _class_of(tokenizer).keep_tables(tokenizer, path)
    else:
        tokenizer.keep_tables(tokenizer.name, path)


def tokenizer_from_dict(fields: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what its `to_dict` returned.

    Raises:
        UserError: No such tokenizer, or a field is missing or wrong.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
        raise UserError("a saved tokenizer must be a JSON object with a field 'name'")
    if fields["name"] not in TOKENIZERS:
        raise UserError(f"a saved tokenizer {fields['name']} is not known; choose from {', '.join(TOKENIZERS)}")
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
