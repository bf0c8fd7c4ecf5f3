"""Tokenizers that need files: tiktoken's tables and tokenizer.json. Runs keep working when the files are deleted."""

import base64
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
import sample
import train
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    build_tokenizer,
    huggingface,
    keep_tables,
    tables,
    tokenizer_from_dict,
)

URL = "https://example.invalid/encodings/toy.tiktoken"
_TOKENS = [*(bytes([b]) for b in range(256)), b"th", b"the", b" the", b"at", b"cat", b" on"]
TABLE = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_TOKENS))
END = 270  # after eight unused ids
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_TABLES = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"))


@pytest.fixture
def table_folders(tmp_path, monkeypatch) -> Path:
    """Create empty folders for all locations where tables are searched, and cut off the network."""
    requests = pytest.importorskip("requests")

    def offline(url, **_):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tables.tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("cache", "tiktoken", "tmp", "given"):
        (tmp_path / name).mkdir()
    tables.load_encoding.cache_clear()
    yield tmp_path
    tables.load_encoding.cache_clear()


@pytest.fixture
def toy(table_folders, monkeypatch) -> Path:
    """Register an encoding ``toy`` with tiktoken, and write its table to a file outside of the searched folders."""
    tiktoken = pytest.importorskip("tiktoken")
    tiktoken.list_encoding_names()

    def constructor() -> dict:
        import tiktoken.load

        ranks = tiktoken.load.load_tiktoken_bpe(URL, expected_hash=hashlib.sha256(TABLE).hexdigest())
        return {
            "name": "toy",
            "pat_str": r" ?\p{L}+|\s|\p{N}|[^\s\p{L}\p{N}]+",
            "mergeable_ranks": ranks,
            "special_tokens": {"<|endoftext|>": END},
        }

    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "toy", constructor)
    file = table_folders / "given" / "toy.tiktoken"
    file.write_bytes(TABLE)
    return file


def _build_toy():
    return build_tokenizer("toy", corpus=None, source="x")


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tiktoken_encoding_by_name(toy: Path) -> None:
    keep_tables("toy", str(toy))
    tokenizer = _build_toy()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("toy", END + 1, END)
    assert tokenizer.encode("the cat").tolist() == [257, 32, 260]
    assert tokenizer.decode([257, END]) == "the<|endoftext|>"
    assert END not in tokenizer.encode_bytes(b"<|endoftext|>", source="x")
    assert tokenizer.decode([257, 265, 266, 257]) == "the\ufffd\ufffdthe"
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    shutil.rmtree(cache_root())
    tables.load_encoding.cache_clear()
    again = tokenizer_from_dict(tokenizer.to_dict())  # sizes and ids need no tables
    assert (again.name, again.vocab_size, again.end_of_text) == ("toy", END + 1, END)


@pytest.mark.parametrize("name", ["toy.tiktoken", hashlib.sha1(URL.encode()).hexdigest()])
def test_tables_found_in_a_folder(toy: Path, monkeypatch, name: str) -> None:
    folder = toy.parent
    toy.rename(folder / name)
    keep_tables("toy", str(folder))
    assert _build_toy().vocab_size == END + 1
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(folder / "empty"))
    tables.load_encoding.cache_clear()
    with pytest.raises(UserError, match="toy"):
        _build_toy()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    assert _build_toy().vocab_size == END + 1


def test_missing_tables_without_a_network(toy: Path, monkeypatch) -> None:
    import requests

    asked, offline = [], requests.get
    monkeypatch.setattr(requests, "get", lambda url, **options: asked.append(options["timeout"]) or offline(url))
    with pytest.raises(UserError) as caught:
        _build_toy()
    for mention in (URL, "TIKTOKEN_CACHE_DIR", "--tokenizer_file", "--tokenizer char", "ConnectionError"):
        assert mention in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"vocab\.bpe and .*encoder\.json into a folder"):
        GPT2Tokenizer().encode("a")
    # One request per encoding, although GPT-2 needs two files, and each with a short timeout.
    assert len(asked) == 2 and all(0 < connect <= 5 and 0 < read <= 60 for connect, read in asked)


def test_wrong_table_is_named_and_kept(toy: Path, table_folders: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(tables, "_download", lambda url, expected: asked.append(url) or TABLE)
    wrong = table_folders / "tiktoken" / hashlib.sha1(URL.encode()).hexdigest()
    wrong.write_bytes(TABLE + b"\n")
    with pytest.raises(UserError, match=f"{wrong} is not toy's toy.tiktoken: its sha256 begins with"):
        _build_toy()
    toy.write_bytes(TABLE[:-1])
    before = _snapshot(table_folders)
    for path in (toy, toy.parent):
        with pytest.raises(UserError, match=f"{toy} is not toy's toy.tiktoken: its sha256 begins with"):
            keep_tables("toy", str(path))
    assert _snapshot(table_folders) == before
    assert not asked
    wrong.unlink()
    assert _build_toy().vocab_size == END + 1 and asked == [URL]
    tables.load_encoding.cache_clear()
    assert _build_toy().vocab_size == END + 1 and asked == [URL]  # the download is cached


def test_wrong_download_is_not_cached(toy: Path, table_folders: Path, monkeypatch) -> None:
    import requests

    answer = requests.Response()
    answer.status_code, answer._content = 200, b"<html>please log in</html>"
    monkeypatch.setattr(requests, "get", lambda url, **_: answer)
    before = _snapshot(table_folders)
    with pytest.raises(UserError, match=f"{URL} returned a file whose sha256"):
        _build_toy()
    assert _snapshot(table_folders) == before


def test_wrong_tokenizer_file_is_refused(toy: Path, table_folders: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer_file .*nowhere: no such file or folder"):
        keep_tables("toy", str(table_folders / "nowhere"))
    with pytest.raises(UserError, match="has no toy.tiktoken, which toy needs"):
        keep_tables("toy", str(table_folders / "tmp"))
    with pytest.raises(UserError, match=r"has no vocab\.bpe and no encoder\.json, which gpt2 needs"):
        keep_tables("gpt2", str(table_folders / "given"))
    for name in ("char", "byte", "x/tokenizer.json"):
        with pytest.raises(UserError, match=f"--tokenizer_file holds .* --tokenizer is {name}; leave it out"):
            keep_tables(name, str(toy))
    with pytest.raises(UserError, match="--tokenizer_file holds .* --tokenizer is byte"):
        keep_tables(ByteTokenizer(), str(toy))


@pytest.mark.tables
def test_gpt2_from_its_two_files(table_folders: Path) -> None:
    for name in ("vocab.bpe", "encoder.json"):
        table = GPT2_TABLES / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        if not table.is_file():
            pytest.skip("needs TIKTOKEN_CACHE_DIR with GPT-2's tables")
        shutil.copyfile(table, table_folders / "given" / name)
    keep_tables("gpt2", str(table_folders / "given"))
    assert GPT2Tokenizer().encode("Hello world").tolist() == [15496, 995]
    with open(table_folders / "given" / "encoder.json", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=r"encoder\.json is not gpt2's encoder\.json"):
        keep_tables("gpt2", str(table_folders / "given"))


def test_missing_packages_are_named(byte_level_file: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tables.load_encoding.cache_clear()
    huggingface._load.cache_clear()
    with pytest.raises(UserError, match=r"pip install -r requirements/huggingface\.txt"):
        build_tokenizer(str(byte_level_file), corpus=None, source="x")
    with pytest.raises(UserError, match=r"pip install -r requirements/nanogpt\.txt"):
        GPT2Tokenizer().encode("a")
    with pytest.raises(UserError, match="cl100k_base is not known; choose from char, byte, gpt2, .*tiktoken"):
        build_tokenizer("cl100k_base", corpus=None, source="x")
    # Vocabulary size and saved form need no package.
    saved = {"name": "huggingface", "tokenizer_json": "{}", "vocab_size": 9, "end_of_text": 3}
    assert tokenizer_from_dict(saved).vocab_size == 9
    assert tokenizer_from_dict({"name": "gpt2"}).vocab_size == 50257


BROKEN = {
    "nothing": b"",
    "half": b'{"version": "1.0", "model": {"type": "BPE"',
    "other JSON": b'{"name": "gpt2"}',
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe{}",
    "merges of nothing": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}',
    "no vocabulary": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_json_is_refused(case: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    file.write_bytes(BROKEN[case])
    with pytest.raises(UserError, match=f"--tokenizer {file}") as caught:
        build_tokenizer(str(file), corpus=None, source="x")
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_json_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(UserError, match=f"--tokenizer {path}: .*give the path of a tokenizer.json"):
            build_tokenizer(str(path), corpus=None, source="x")


def test_tokens_ignore_truncation_padding_and_dropout(byte_level_file: Path, tmp_path: Path) -> None:
    """Check that truncation, padding, BPE dropout and a template for special tokens are ignored."""
    import tokenizers

    plain = build_tokenizer(str(byte_level_file), corpus=None, source="x")
    library = tokenizers.Tokenizer.from_file(str(byte_level_file))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.model.dropout = 0.9
    library.save(str(tmp_path / "tokenizer.json"))
    other = build_tokenizer(str(tmp_path / "tokenizer.json"), corpus=None, source="x")
    text = "the cat sat on a mat and saw one dog run by"
    assert other.encode(text).tolist() == plain.encode(text).tolist()
    with pytest.raises(UserError, match="token 300 is not in the huggingface tokenizer's vocabulary of 300"):
        plain.decode([300])


def test_decode_with_a_gap_in_the_vocabulary(byte_level_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    content = json.loads(byte_level_file.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {t: i if i < 299 else 310 for t, i in content["model"]["vocab"].items()}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = build_tokenizer(str(file), corpus=None, source="x")
    assert tokenizer.vocab_size == 311
    assert tokenizer.decode([1, 305, 1]) == f"{tokenizer.decode([1])}\ufffd{tokenizer.decode([1])}"


def test_encode_text_without_tokens_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?")).save(str(file))
    tokenizer = build_tokenizer(str(file), corpus=None, source="x")
    assert tokenizer.encode("a").tolist() == [0] and tokenizer.end_of_text is None
    with pytest.raises(UserError, match=r"has no tokens for in\.txt"):
        tokenizer.encode_bytes(b"b", source="in.txt")


def _assert_run_works_without(file: Path, out_dir: Path, other: Path, capsys) -> None:
    """Delete the tokenizer's file, then sample, evaluate and resume the run."""
    file.unlink()
    tables.load_encoding.cache_clear()
    checkpoint = f"--checkpoint={out_dir}"
    capsys.readouterr()
    sample.main([checkpoint, "--prompt=the cat<|endoftext|>", "--max_new_tokens=5", "--accelerator=cpu"])
    assert "the cat<|endoftext|>" in capsys.readouterr().out
    evaluate.main([checkpoint, "--accelerator=cpu", f"--json={out_dir}/own.json"])
    evaluate.main([checkpoint, "--accelerator=cpu", f"--data={other}", f"--json={out_dir}/other.json"])
    own, others = (json.loads((out_dir / f"{name}.json").read_text()) for name in ("own", "other"))
    assert own["tokens"] != others["tokens"] and own["bits_per_byte"] and others["bits_per_byte"]
    evaluate.main([checkpoint, "--convert_only"])
    canonical = next(out_dir.rglob("lightning_gpt_tokenizer.json")).parent
    evaluate.main([f"--checkpoint={canonical}", "--accelerator=cpu", f"--json={out_dir}/canonical.json"])
    assert json.loads((out_dir / "canonical.json").read_text())["loss"] == pytest.approx(own["loss"])
    train.main([f"--resume={out_dir}", "--max_steps=5"])
    assert open_checkpoint(out_dir / "checkpoints" / "last.ckpt", trust=False).step == 5


@pytest.fixture
def other_text(tmp_path) -> Path:
    file = tmp_path / "other.txt"
    file.write_text("Two dogs, 3 caf\u00e9s.\n" * 60, encoding="utf-8")
    return file


def test_run_works_after_its_tokenizer_json_is_deleted(
    byte_level_file, text_file, tiny_flags, other_text, tmp_path, capsys
) -> None:
    file, out_dir = tmp_path / "tokenizer.json", tmp_path / "run"
    shutil.copyfile(byte_level_file, file)
    train.main([*tiny_flags, f"--data={text_file}", f"--tokenizer={file}", f"--out_dir={out_dir}"])
    _assert_run_works_without(file, out_dir, other_text, capsys)


def test_run_works_after_its_tables_are_deleted(toy: Path, text_file, tiny_flags, other_text, tmp_path, capsys) -> None:
    out_dir = tmp_path / "run"
    flags = ["--tokenizer=toy", f"--tokenizer_file={toy}"]
    train.main([*tiny_flags, f"--data={text_file}", *flags, f"--out_dir={out_dir}"])
    _assert_run_works_without(toy, out_dir, other_text, capsys)


def test_tokenizer_file_is_checked_first(tiny_flags, text_file, tmp_path, capsys) -> None:
    out_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        train.main([*tiny_flags, f"--data={text_file}", f"--tokenizer_file={tmp_path}", f"--out_dir={out_dir}"])
    assert exit_.value.code == 2 and not out_dir.exists()
    assert "--tokenizer is char; leave it out" in capsys.readouterr().err


def test_other_text_is_scored_with_the_tokenizer_of_the_run(tiny_run, tmp_path, capsys) -> None:
    own = open_checkpoint(tiny_run / "checkpoints" / "best.ckpt", trust=False).tokenizer
    text = "a moon under the dog\nsaw\n" * 40
    known, unknown = tmp_path / "known.txt", tmp_path / "unknown.txt"
    known.write_text(text)
    unknown.write_text(text + "Q")
    assert len(set(text)) < own.vocab_size
    files = prepare(str(known), tokenizer=own, block_size=8)
    assert files.tokenizer.to_dict() == own.to_dict()
    assert own.decode(files.tokens("val")) == text[int(0.9 * len(text)) :]
    assert prepare(str(known), tokenizer=own, block_size=8).folder == files.folder
    assert prepare(str(known), tokenizer="char", block_size=8).folder != files.folder
    evaluate.main([f"--checkpoint={tiny_run}", f"--data={known}", "--accelerator=cpu"])
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([f"--checkpoint={tiny_run}", f"--data={unknown}", "--accelerator=cpu"])
    assert exit_.value.code == 2
    assert f"{unknown}: character 'Q' (U+0051) is not in this tokenizer's vocabulary" in capsys.readouterr().err


def test_prepare_reuses_tokens_of_an_equal_tokenizer(text_file) -> None:
    files = prepare(str(text_file), tokenizer="char", block_size=8)
    assert prepare(str(text_file), tokenizer=files.tokenizer, block_size=8).folder == files.folder


def test_tokens_of_another_tokenizer_are_refused(byte_level_file, tmp_path: Path) -> None:
    def folder(name: str, tokenizer) -> str:
        ids = np.arange(40) % 3
        size = tokenizer.vocab_size if tokenizer else 3
        write_token_files(tmp_path / name, train=ids, val=ids, tokenizer=tokenizer, vocab_size=size, source="x")
        return str(tmp_path / name)

    file = build_tokenizer(str(byte_level_file), corpus=None, source="x")
    ours, others = CharTokenizer("abc"), CharTokenizer("abd")
    for name, made_by, asked in [("1", others, ours), ("2", None, ours), ("3", ours, file), ("4", file, ours)]:
        data = folder(name, made_by)
        with pytest.raises(UserError, match=f"the tokens of {data} were made by another tokenizer .*{asked.name}"):
            prepare(data, tokenizer=asked, block_size=8)
    assert (
        prepare(folder("5", file), tokenizer=str(byte_level_file), block_size=8).tokenizer.to_dict() == file.to_dict()
    )
    with pytest.raises(UserError, match="--tokenizer_file: .* does not record its tokenizer"):
        prepare(folder("6", None), tokenizer=None, tokenizer_file="x", block_size=8)


def test_resume_with_another_tokenizer_is_refused(tiny_run, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([f"--resume={tiny_run}", "--tokenizer=byte", f"--out_dir={tmp_path}/new", "--max_steps=5"])
    assert exit_.value.code == 2
    assert "--tokenizer byte differs from the run's tokenizer (char)" in capsys.readouterr().err


def test_tokenizer_json_with_other_line_endings_is_recognised(byte_level_file, tmp_path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(byte_level_file.read_bytes().replace(b"\n", b"\r\n"))
    tokenizer = build_tokenizer(str(file), corpus=None, source="x")
    assert tokenizer.answers_to(str(file))
