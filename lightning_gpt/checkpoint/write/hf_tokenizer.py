"""A tokenizer in the files that Hugging Face's ``AutoTokenizer`` opens.

A kind of tokenizer has a row in ``TOKENIZER_JSON``, by the name in its saved form.
"""

import json
from collections.abc import Callable
from typing import Any

from lightning_gpt.tokenizers import CharTokenizer, HuggingFaceTokenizer, Tokenizer
from lightning_gpt.tokenizers.tables import load_encoding


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of the tokenizer's ``tokenizer.json``.

    Raises:
        UserError: The tables of a tiktoken encoding cannot be had.
    """
    return TOKENIZER_JSON[tokenizer.to_dict()["name"]](tokenizer)


def tokenizer_config(tokenizer: Tokenizer, text: str, *, block_size: int) -> dict[str, Any]:
    """The ``tokenizer_config.json`` that goes with a ``tokenizer.json``.

    Args:
        tokenizer: The tokenizer.
        text: What ``tokenizer_json`` says of it.
        block_size: The longest sequence that the model reads, in tokens.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    added = json.loads(text)["added_tokens"] if tokenizer.end_of_text is not None else ()
    for token in added:
        if token["id"] == tokenizer.end_of_text:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), token["content"])
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


def _written(*, model: dict[str, Any], added: list[dict[str, Any]], **steps: Any) -> str:
    """A ``tokenizer.json``; steps that are not given are none."""
    fields = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": added, **dict.fromkeys(fields), **steps, "model": model}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _from_ranks(ranks: dict[bytes, int], *, pattern: str, specials: dict[str, int]) -> str:
    """Byte-pair encoding as tiktoken has it: a join is known by the rank of what it gives, which is its id as well."""
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    in_order = sorted(specials.items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _written(
        added=[{"id": index, "content": token, **flags} for token, index in in_order],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [_split(pattern), byte_level]},
        decoder=byte_level,
        model={
            "type": "BPE",
            "vocab": {text(token): ranks[token] for token in by_rank} | dict(in_order),
            "merges": [[text(part) for part in _parts(token, ranks)] for token in by_rank if len(token) > 1],
        },
    )


def _from_tiktoken(tokenizer: Tokenizer) -> str:
    encoding = load_encoding(tokenizer.name)
    # Possessive in tiktoken, where nothing follows it; to Hugging Face's library it would be one or more times {1,3}.
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
    return _from_ranks(encoding._mergeable_ranks, pattern=pattern, specials=encoding._special_tokens)


def _from_bytes(tokenizer: Tokenizer) -> str:
    return _from_ranks({bytes([byte]): byte for byte in range(256)}, pattern=r"[\s\S]", specials={})


def _from_characters(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer, CharTokenizer)
    vocabulary = {char: index for index, char in enumerate(tokenizer.chars)}
    return _written(
        added=[],
        pre_tokenizer=_split(r"[\s\S]"),
        decoder={"type": "Fuse"},
        # The unknown token must be named and is not in the vocabulary: an unknown character is an error, as with us.
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"},
    )


def _as_it_was(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.text


TOKENIZER_JSON: dict[str, Callable[[Tokenizer], str]] = {
    "char": _from_characters,
    "byte": _from_bytes,
    "gpt2": _from_tiktoken,
    "tiktoken": _from_tiktoken,
    "huggingface": _as_it_was,
}
