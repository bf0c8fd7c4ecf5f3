"""Exported tokenizers: ``AutoTokenizer`` opens what ``evaluate.py --export hf`` writes."""

import json
import os
from pathlib import Path

import pytest

from lightning_gpt.checkpoint.write import hf_tokenizer
from lightning_gpt.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    bpe,
)

transformers = pytest.importorskip("transformers")


def assert_same_tokens(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> object:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    if tokenizer.end_of_text is not None:
        assert theirs.eos_token_id == tokenizer.end_of_text
    return theirs


TEXTS = [
    "Hello world, it's 12345 o'clock!\n\n\n  def f(x):\r\n\treturn x  \n",
    " leading, trailing   ",
    "\n",
    "\u00e9e\u0301 \u4f60\u597d \U0001f469\u200d\U0001f469\u200d\U0001f467 \ufdfa \u0661\u0662 \u00bd\u00b2",
    "a\u00a0b\u2028c\u0085d\x00\x1f'LL 'll 's'S",
]


@pytest.mark.usefixtures("gpt2_tables")
def test_hf_export_has_the_tokens_of_gpt2(saved_model, export):
    tokenizer = GPT2Tokenizer()
    folder, stderr = export(saved_model("nanogpt", tokenizer, vocab_padding=47), "hf")
    theirs = assert_same_tokens(folder, tokenizer, TEXTS)
    assert theirs.bos_token_id == theirs.unk_token_id == 50256 and theirs.eos_token == "<|endoftext|>"
    assert theirs.model_max_length == 12 and "AutoTokenizer" not in stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.bos_token_id) == (50257, 50256, 50256)
    assert model.generate(**theirs(TEXTS[2], return_tensors="pt"), max_new_tokens=2).shape == (1, 3)


@pytest.mark.usefixtures("gpt2_tables")
def test_hf_export_has_the_published_merges_of_gpt2(saved_model, export):
    folder, _ = export(saved_model("nanogpt", GPT2Tokenizer()), "hf")
    ours = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    files = [file.read_text(encoding="utf-8") for file in Path(folder).iterdir()] if folder else []
    merges = next((text for text in files if text.startswith("#version: 0.2")), None)
    vocabulary = next((json.loads(text) for text in files if text.startswith("{")), None)
    if merges is None or vocabulary is None:
        pytest.skip("GPT-2's published tables are not in TIKTOKEN_CACHE_DIR")
    assert [" ".join(pair) for pair in ours["merges"]] == merges.split("\n")[1:-1]
    assert ours["vocab"] == vocabulary


def test_hf_export_has_the_tokens_of_another_encoding(saved_model, export, monkeypatch):
    """Use cl100k's pattern, whose {1,3}+ has another meaning in Hugging Face's library."""
    tiktoken = pytest.importorskip("tiktoken")
    joined = [b"12", b"34", b"1234", b"th", b"the", b" the", b"\n\n", b"\r\n", b"!!", b"!!\n"]
    ranks = {bytes([(i + 7) % 256]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(joined)}
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    )
    specials = {"<|endoftext|>": 266, "<|more|>": 267}
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    for module in (hf_tokenizer, bpe):
        monkeypatch.setattr(module, "load_encoding", lambda name: encoding)
    tokenizer = TiktokenTokenizer("small", vocab_size=268, end_of_text=266)
    folder, _ = export(saved_model("nanogpt", tokenizer), "hf")
    theirs = assert_same_tokens(folder, tokenizer, [*TEXTS, "1234512345 the the!!\n\n the"])
    assert theirs("<|more|>")["input_ids"] == [267]


def test_hf_export_has_byte_tokens(saved_model, export):
    folder, _ = export(saved_model("nanogpt", ByteTokenizer()), "hf")
    theirs = assert_same_tokens(folder, ByteTokenizer(), TEXTS)
    # lm-eval needs a token at the beginning and the end of a text; generation does not stop there.
    assert theirs.bos_token_id == theirs.eos_token_id == ord("~")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None


@pytest.mark.parametrize(("chars", "separator"), [("\n abc$", "$"), ("0123456789", None)])
def test_hf_export_of_characters_takes_any_text(saved_model, export, chars, separator):
    tokenizer = CharTokenizer(chars)
    folder, _ = export(saved_model("nanogpt", tokenizer), "hf")
    theirs = assert_same_tokens(folder, tokenizer, [chars * 2])
    assert theirs.bos_token == theirs.eos_token == separator
    text = f"{chars[:2]}\U0001f469\u00e9{chars[:2]}"
    unknown = " " if " " in chars else chars[0]
    assert theirs(text)["input_ids"] == tokenizer.encode(text[:2] + 2 * unknown + text[:2]).tolist()
    pipeline = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    written = pipeline(text, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert written.startswith(text) and set(written.removeprefix(text)) <= set(chars)


def test_hf_export_copies_a_hugging_face_tokenizer(saved_model, export, byte_level_file):
    tokenizer = HuggingFaceTokenizer.build(str(byte_level_file), corpus=None, source="")
    folder, _ = export(saved_model("nanogpt", tokenizer), "hf")
    assert (folder / "tokenizer.json").read_bytes() == byte_level_file.read_bytes()
    assert assert_same_tokens(folder, tokenizer, TEXTS).eos_token == "<|endoftext|>"
