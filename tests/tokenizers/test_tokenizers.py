"""Tokenizers: round trips of any text, cuts that preserve tokens, saved form, one-line errors."""

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers import (
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    build_tokenizer,
    tables,
    tokenizer_from_dict,
)


@pytest.fixture(scope="module")
def gpt2(gpt2_tables) -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def byte_level(byte_level_file: Path) -> HuggingFaceTokenizer:
    return build_tokenizer(str(byte_level_file), corpus=None, source="x")


# What the patterns distinguish: white space, letters, contractions, digits, punctuation and non-ASCII characters.
TRICKY = st.text(alphabet=" \t\r\n\x1c\u2003\u00a0ab'sB1.!/\u00e9\u0301\u65e5\U0001f600", max_size=60)


@given(st.text())
def test_byte_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(text.encode())
    assert np.array_equal(tokenizer.encode_bytes(text.encode(), source="x"), ids)
    assert tokenizer.decode(ids) == text


@given(st.text(min_size=1))
def test_char_round_trip(text: str) -> None:
    tokenizer = build_tokenizer("char", corpus=text.encode(), source="x")
    assert tokenizer.vocab_size == len(set(text))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [sorted(set(text)).index(char) for char in text]
    assert np.array_equal(tokenizer.encode_bytes(text.encode(), source="x"), ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@given(st.text(max_size=200))
@settings(deadline=None)
def test_gpt2_round_trip(gpt2: GPT2Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids.dtype == np.int64
    assert np.array_equal(gpt2.encode_bytes(text.encode(), source="x"), ids)
    assert gpt2.decode(ids) == text


@given(st.lists(st.sampled_from(["<|endoftext|>", "<|", "|>", "endoftext", " ", "\n", "a\u00e9"])).map("".join))
@settings(deadline=None)
def test_gpt2_matches_tiktoken(gpt2: GPT2Tokenizer, text: str) -> None:
    import tiktoken

    expected = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2.encode(text).tolist() == expected
    assert gpt2.encode_bytes(text.encode(), source="x").tolist() == expected
    assert gpt2.decode(expected) == text
    assert gpt2.end_of_text == tiktoken.get_encoding("gpt2").eot_token


@given(st.text(max_size=200) | st.lists(st.sampled_from(["<|endoftext|>", "the", " ", "\n"])).map("".join))
@settings(deadline=None)
def test_hugging_face_byte_level_round_trip(byte_level: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert ids.dtype == np.int64
    assert np.array_equal(byte_level.encode_bytes(text.encode(), source="x"), ids)
    assert byte_level.decode(ids) == text
    assert byte_level.end_of_text not in ids


def test_hugging_face_matches_the_library(byte_level: HuggingFaceTokenizer, text_file: Path) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(byte_level.text)
    text = text_file.read_text() + "caf\u00e9 \U0001f600\n\n  's"
    assert byte_level.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert len(byte_level.encode(text)) < len(text) / 2
    end = library.token_to_id("<|endoftext|>")
    assert (byte_level.end_of_text, byte_level.vocab_size) == (end, library.get_vocab_size())
    # By default the library parses this text as the special token.
    assert end in library.encode("a<|endoftext|>").ids
    assert byte_level.decode([end]) == "<|endoftext|>"


def _cuts(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return all cuts of a text, and check that `cut` finds the next one from every start."""
    places = sorted({at for start in range(len(data) + 2) if (at := tokenizer.cut(data, start)) is not None})
    for start in range(len(data) + 2):
        assert tokenizer.cut(data, start) == next((at for at in places if at >= start), None)
    return places


@given(TRICKY)
def test_cuts_of_char_and_byte_are_character_boundaries(text: str) -> None:
    data = text.encode()
    assert _cuts(ByteTokenizer(), data) == list(range(1, len(data)))
    tokenizer = CharTokenizer("".join(sorted(set(text) | {"x"})))
    assert _cuts(tokenizer, data) == [len(text[:n].encode()) for n in range(1, len(text))]


@given(TRICKY)
@settings(deadline=None, max_examples=300)
def test_cuts_preserve_the_tokens_of_gpt2(gpt2: GPT2Tokenizer, text: str) -> None:
    _assert_cuts_preserve_tokens(gpt2, text)
    assert len(_cuts(gpt2, ("\na" + text + "\na").encode())) >= 1


@given(TRICKY)
@settings(deadline=None, max_examples=300)
def test_cuts_preserve_the_tokens_of_hugging_face(byte_level: HuggingFaceTokenizer, text: str) -> None:
    _assert_cuts_preserve_tokens(byte_level, text)
    assert len(_cuts(byte_level, ("\na" + text + "\na").encode())) >= 1


def _assert_cuts_preserve_tokens(tokenizer: Tokenizer, text: str) -> None:
    data = text.encode()
    whole = tokenizer.encode(text).tolist()
    for at in _cuts(tokenizer, data):
        assert tokenizer.encode(data[:at].decode()).tolist() + tokenizer.encode(data[at:].decode()).tolist() == whole


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony"])
@given(text=TRICKY)
@example(text="!\n/")
@settings(deadline=None, max_examples=200)
def test_cuts_preserve_the_pieces_of_the_pattern(name: str, text: str) -> None:
    pattern = _pattern(name)
    tokenizer = TiktokenTokenizer(name, vocab_size=1, end_of_text=None)
    data = text.encode()
    whole = pattern.findall(text)
    assert "".join(whole) == text
    for at in _cuts(tokenizer, data):
        assert pattern.findall(data[:at].decode()) + pattern.findall(data[at:].decode()) == whole
    assert len(_cuts(tokenizer, b"a\nb\n\n  \n!\r\n/")) >= 2


@functools.cache
def _pattern(name: str):
    """Return an encoding's pattern for the package regex, whose $ would also match before a final newline."""
    pytest.importorskip("tiktoken")
    import regex

    fields, _ = tables._construct(name, lambda url, expected: None)
    return regex.compile(fields["pat_str"].replace("$", r"\Z"))


def test_no_cut_for_unknown_patterns_and_settings(byte_level: HuggingFaceTokenizer) -> None:
    other = json.loads(byte_level.text)
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": other["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": other["pre_tokenizer"] | {"use_regex": False}},
        {"pre_tokenizer": None},
        {"added_tokens": [other["added_tokens"][0] | {"special": False}]},
    ):
        changed = HuggingFaceTokenizer(json.dumps(other | change), vocab_size=1, end_of_text=None)
        assert changed.cut(b"a\nb\nc", 0) is None
    assert TiktokenTokenizer("mine", vocab_size=1, end_of_text=None).cut(b"a\nb\nc", 0) is None
    assert byte_level.cut(b"a\nb\nc", 2) == 3


def test_gpt2_encodes_special_tokens_as_plain_text(gpt2: GPT2Tokenizer) -> None:
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_loads_without_tables() -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer_from_dict({"name": "gpt2"})))
    assert (tokenizer.name, tokenizer.vocab_size) == ("gpt2", 50257)


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("ba\u00e9\U0001f600\n"),
        ByteTokenizer(),
        GPT2Tokenizer(),
        TiktokenTokenizer("cl100k_base", vocab_size=100277, end_of_text=100257),
        HuggingFaceTokenizer("{}", vocab_size=7, end_of_text=None),
    ],
    ids=lambda t: t.name,
)
def test_saved_form_round_trip(tokenizer) -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is type(tokenizer)
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.name, again.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert again.end_of_text == tokenizer.end_of_text


@pytest.mark.parametrize("text", ["abX", "ab\U0001f600", "a\nb"])
def test_char_encode_of_a_missing_character(text: str) -> None:
    missing = next(char for char in text if char not in "ab")
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab").encode(text)
    assert f"(U+{ord(missing):04X}) is not in this tokenizer's vocabulary of 2 characters" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_decode_of_an_incomplete_character() -> None:
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\ufffd"


def test_byte_encode_of_surrogate_escapes() -> None:
    assert ByteTokenizer().encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [0x61, 0xFF]


@pytest.mark.parametrize("ids", [[0, 2], [-1]])
def test_decode_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"token {ids[-1]} is not in the char tokenizer's vocabulary of 2"):
        CharTokenizer("ab").decode(ids)


def test_empty_text_round_trip() -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        assert tokenizer.encode("").shape == (0,)
        assert tokenizer.decode([]) == ""


def test_char_refuses_bytes_that_are_not_utf8() -> None:
    with pytest.raises(UserError, match=r"in\.txt is not UTF-8 text \(byte 1 is 0xFF\).*--tokenizer byte"):
        build_tokenizer("char", corpus=b"a\xff", source="in.txt")
    assert build_tokenizer("byte", corpus=b"a\xff", source="in.txt").vocab_size == 256


def test_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="choose from char, byte, gpt2"):
        build_tokenizer("word", corpus=b"a", source="x")
    assert list(TOKENIZERS) == ["char", "byte", "gpt2", "tiktoken", "huggingface"]


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {},
        {"name": "char"},
        {"name": "char", "chars": "aa"},
        {"name": "word"},
        {"name": "tiktoken", "encoding": "cl100k_base", "vocab_size": "many"},
        {"name": "huggingface", "tokenizer_json": {}, "vocab_size": 3},
    ],
)
def test_damaged_saved_form_is_refused(fields) -> None:
    with pytest.raises(UserError):
        tokenizer_from_dict(fields)


def test_char_without_a_corpus_is_refused() -> None:
    with pytest.raises(UserError, match="--tokenizer byte"):
        build_tokenizer("char", corpus=None, source="x")
