"""A tokenizer in the files that Hugging Face's ``AutoTokenizer`` opens.

A kind of tokenizer that can be said so has a row in ``TOKENIZER_JSON``, by the name in its ``to_dict``.
"""

from collections.abc import Callable
from typing import Any

from lightning_gpt.tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def tokenizer_json(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """The content of ``tokenizer.json``; None where there is no tokenizer, or none that Hugging Face has a form for.

    Raises:
        UserError: What its tables are read from is missing.
    """
    build = TOKENIZER_JSON.get(tokenizer.name) if tokenizer else None
    return build(tokenizer) if tokenizer and build else None


def end_of_text(content: dict[str, Any] | None) -> int | None:
    """The id of <|endoftext|> in a ``tokenizer.json``, where it has that token."""
    added = content["added_tokens"] if content else ()
    return next((token["id"] for token in added if token["content"] == END_OF_TEXT), None)


def tokenizer_config(content: dict[str, Any], *, block_size: int) -> dict[str, Any]:
    """The ``tokenizer_config.json`` that goes with a ``tokenizer.json``."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if end_of_text(content) is not None:
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return config


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next one above U+00FF."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that byte-pair encoding joins last into a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def from_tiktoken(encoding: Any) -> dict[str, Any]:
    """The ``tokenizer.json`` of a ``tiktoken.Encoding``: its ranks as a vocabulary of byte characters, and merges."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token, index in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": encoding._pat_str},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text(token): ranks[token] for token in by_rank} | dict(specials),
            "merges": [list(map(text, _parts(token, ranks))) for token in by_rank if len(token) > 1],
        },
    }


def _gpt2(tokenizer: Tokenizer) -> dict[str, Any]:
    from lightning_gpt.tokenizers import _gpt2_encoding

    return from_tiktoken(_gpt2_encoding())


TOKENIZER_JSON: dict[str, Callable[[Tokenizer], dict[str, Any]]] = {"gpt2": _gpt2}
