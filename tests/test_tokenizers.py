"""Tokenizers: round trips on any text, saved form, and the one-line errors."""

import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gpt.config import UserError
from lightning_gpt.tokenizers import (
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer()
    try:
        tokenizer.encode("a")
    except UserError as error:
        pytest.skip(f"GPT-2's tables cannot be loaded here: {error}")
    return tokenizer


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
    assert gpt2.decode(ids) == text


@given(st.text(alphabet=" \t\r\n\x1c\u2003ab'sB1.!\u00e9\u65e5\U0001f600", max_size=80), st.integers(1, 20))
@settings(deadline=None, max_examples=300)
def test_gpt2_chunks_do_not_change_the_tokens(gpt2: GPT2Tokenizer, text: str, size: int) -> None:
    chunked = gpt2.encode_bytes(text.encode(), source="x", chunk_characters=size)
    assert np.array_equal(chunked, gpt2.encode(text))


def test_gpt2_special_tokens_in_a_text_are_plain_text(gpt2: GPT2Tokenizer) -> None:
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_needs_tables_only_to_encode() -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer_from_dict({"name": "gpt2"})))
    assert (tokenizer.name, tokenizer.vocab_size) == ("gpt2", 50257)


@pytest.fixture
def fresh_gpt2(monkeypatch: pytest.MonkeyPatch):
    from lightning_gpt import tokenizers

    tokenizers._gpt2_encoding.cache_clear()
    yield monkeypatch
    tokenizers._gpt2_encoding.cache_clear()


def test_gpt2_without_tiktoken(fresh_gpt2: pytest.MonkeyPatch) -> None:
    fresh_gpt2.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/nanogpt\.txt"):
        GPT2Tokenizer().encode("a")


def test_gpt2_without_tables(fresh_gpt2: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name: str) -> None:
        raise ConnectionError("no network")

    fresh_gpt2.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer char"):
        GPT2Tokenizer().encode("a")


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("ba\u00e9\U0001f600\n"), ByteTokenizer(), GPT2Tokenizer()], ids=lambda t: t.name
)
def test_saved_form(tokenizer) -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is type(tokenizer)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("text", ["abX", "ab\U0001f600", "a\nb"])
def test_char_missing_character(text: str) -> None:
    missing = next(char for char in text if char not in "ab")
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab").encode(text)
    assert f"(U+{ord(missing):04X}) is not in this tokenizer's vocabulary of 2 characters" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_decode_of_a_cut_character() -> None:
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\ufffd"


def test_byte_encode_of_a_command_line_that_is_not_utf8() -> None:
    assert ByteTokenizer().encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [0x61, 0xFF]


@pytest.mark.parametrize("ids", [[0, 2], [-1]])
def test_decode_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"token {ids[-1]} is not in the char tokenizer's vocabulary of 2"):
        CharTokenizer("ab").decode(ids)


def test_empty() -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        assert tokenizer.encode("").shape == (0,)
        assert tokenizer.decode([]) == ""


def test_not_utf8() -> None:
    with pytest.raises(UserError, match=r"in\.txt is not UTF-8 text \(byte 1 is 0xFF\).*--tokenizer byte"):
        build_tokenizer("char", corpus=b"a\xff", source="in.txt")
    assert build_tokenizer("byte", corpus=b"a\xff", source="in.txt").vocab_size == 256


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="choose from char, byte, gpt2"):
        build_tokenizer("word", corpus=b"a", source="x")
    assert list(TOKENIZERS) == ["char", "byte", "gpt2"]


@pytest.mark.parametrize("fields", [None, {}, {"name": "char"}, {"name": "char", "chars": "aa"}, {"name": "word"}])
def test_damaged_saved_form(fields) -> None:
    with pytest.raises(UserError):
        tokenizer_from_dict(fields)


def test_char_without_a_corpus() -> None:
    with pytest.raises(UserError, match="--tokenizer byte"):
        build_tokenizer("char", corpus=None, source="x")
