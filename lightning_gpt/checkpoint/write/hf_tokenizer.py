"""Write a tokenizer as the files that Hugging Face's ``AutoTokenizer`` opens.

``TOKENIZER_JSON`` has a row for each kind of tokenizer, keyed as in ``tokenizers.TOKENIZERS``.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer
from lightning_gpt.tokenizers.huggingface import added_tokens
from lightning_gpt.tokenizers.tables import load_encoding

_RARE = "~^`|\\$#@&%*+=<>{}[]_"  # ASCII, which byte-level BPE spells as it is


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the text of ``tokenizer.json``.

    Raises:
        UserError: The tables of a tiktoken encoding are not available.
    """
    return TOKENIZER_JSON[tokenizer.to_dict()["name"]](tokenizer)


def tokenizer_config(tokenizer: Tokenizer, text: str, *, block_size: int) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``.

    Args:
        tokenizer: The tokenizer.
        text: Its ``tokenizer.json``.
        block_size: Context length of the model in tokens.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    separator = _separator(tokenizer)
    if separator is not None:
        return config | {"bos_token": separator, "eos_token": separator}
    added = added_tokens(text) if tokenizer.end_of_text is not None else ()
    for token in added:
        if token["id"] == tokenizer.end_of_text:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), token["content"])
    return config


def _separator(tokenizer: Tokenizer) -> str | None:
    """Return the character that stands for the beginning and the end of a text; None for other kinds of tokenizers.

    Programs such as lm-eval need one, and characters and bytes have no token of their own for it. transformers leaves
    such a token out of the text that it decodes for people, so it is a symbol that texts rarely hold; a vocabulary
    without any has none.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return _RARE[0]
    if isinstance(tokenizer, CharTokenizer):
        return next((char for char in _RARE if char in tokenizer.chars), None)
    return None


def spelled(token: bytes) -> str:
    """Return a token in GPT-2's printable spelling, in which a space is U+0120."""
    characters = _byte_characters()
    return "".join(characters[byte] for byte in token)


def vocabulary(ranks: dict[bytes, int], *, specials: dict[str, int]) -> dict[str, int]:
    """Return the ids of all tokens by their spelling, special tokens last."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    return {spelled(token): ranks[token] for token in by_rank} | dict(
        sorted(specials.items(), key=lambda item: item[1])
    )


@functools.cache
def _byte_characters() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: its Latin-1 character, or the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that byte-pair encoding merges last to form a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _to_json(*, model: dict[str, Any], added: list[dict[str, Any]], **steps: Any) -> str:
    """Return the text of a ``tokenizer.json``; steps that are not given are null."""
    fields = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": added, **dict.fromkeys(fields), **steps, "model": model}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _from_ranks(ranks: dict[bytes, int], *, pattern: str, specials: dict[str, int]) -> str:
    """Express tiktoken's byte-pair encoding, in which the rank of a merge is the id of the merged token."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    in_order = sorted(specials.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _to_json(
        added=[{"id": index, "content": token, **flags} for token, index in in_order],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [_split(pattern), byte_level]},
        decoder=byte_level,
        model={
            "type": "BPE",
            "vocab": vocabulary(ranks, specials=specials),
            "merges": [[spelled(part) for part in _parts(token, ranks)] for token in by_rank if len(token) > 1],
        },
    )


def _from_tiktoken(tokenizer: Tokenizer) -> str:
    encoding = load_encoding(tokenizer.name)
    # In tiktoken {1,3}+ is possessive; Hugging Face's library would read it as a repeated {1,3}. Nothing follows it, so
    # a plain {1,3} matches the same text.
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
    return _from_ranks(encoding._mergeable_ranks, pattern=pattern, specials=encoding._special_tokens)


def _from_bytes(tokenizer: Tokenizer) -> str:
    return _from_ranks({bytes([byte]): byte for byte in range(256)}, pattern=r"[\s\S]", specials={})


def _from_characters(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer, CharTokenizer)
    vocabulary = {char: index for index, char in enumerate(tokenizer.chars)}
    return _to_json(
        added=[],
        pre_tokenizer=_split(r"[\s\S]"),
        decoder={"type": "Fuse"},
        # Our own tokenizer refuses unknown characters, but here texts of any kind must pass.
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": " " if " " in vocabulary else tokenizer.chars[0]},
    )


def _from_huggingface(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.text


TOKENIZER_JSON: dict[str, Callable[[Tokenizer], str]] = {
    "char": _from_characters,
    "byte": _from_bytes,
    "gpt2": _from_tiktoken,
    "tiktoken": _from_tiktoken,
    "huggingface": _from_huggingface,
}
