"""prepare.py: every input format gives the tokens of the plain text; bad input gives a one-line error."""

import gzip
import hashlib
import io
import json
import os
import sys
import types
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

import prepare
from lightning_gpt.data.text import documents, sets
from lightning_gpt.data.tokens import encoding, tokenizing, writing
from lightning_gpt.data.tokens.token_files import open_token_files

TEXTS = [f"Document {n}:\n\u00e9\u65e5\U0001f600 " + "la " * (7 * n % 40) for n in range(120)] + ["", "x" * 5000]


@pytest.fixture
def small_units(monkeypatch):
    """Make blocks, units and batches small, and commit every unit."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 700)
    monkeypatch.setattr(documents, "_BATCH_BYTES", 2000)
    monkeypatch.setattr(encoding, "UNIT_BYTES", 1000)
    monkeypatch.setattr(tokenizing, "COMMIT_SECONDS", 0.0)


def _zst(path: Path, content: bytes) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(content)


def _parquet(path: Path, texts: list, column: str = "text", **options) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path, **options)


def _gz(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content[:99]) + gzip.compress(content[99:]))  # two members, as `cat a.gz b.gz` gives


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = {".gz": _gz, ".zst": _zst}
    writers.get(path.suffix.lower(), Path.write_bytes)(path, content)
    return path


def _rows(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


def _tokens(out: Path) -> tuple[bytes, bytes]:
    return (out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()


def _prepare(tmp_path: Path, *inputs: object, tokenizer: object = "byte", flags: tuple = ()) -> tuple[bytes, bytes]:
    prepare.main([*map(str, inputs), f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer}", *flags])
    return _tokens(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.zst", "a.TXT.GZ", "noname"])
def test_compressed_text_equals_plain_text(tmp_path, small_units, name):
    content = "\n".join(TEXTS).encode()
    plain = _prepare(tmp_path, _write(tmp_path / "a.txt", content), tokenizer="char")
    assert _prepare(tmp_path, _write(tmp_path / name, content), tokenizer="char") == plain


def test_all_row_formats_give_the_same_tokens(tmp_path, small_units, byte_level_file):
    first = _prepare(tmp_path, _write(tmp_path / "1.jsonl", _rows(TEXTS)), tokenizer=byte_level_file)
    (tmp_path / "2.parquet").parent.mkdir(exist_ok=True)
    _parquet(tmp_path / "2.parquet", TEXTS, row_group_size=50, compression="zstd")
    lines = _rows(TEXTS).splitlines(keepends=True)
    folder = tmp_path / "folder"
    _write(folder / "a.jsonl", b"".join(lines[:40]) + b"\n  \n")  # empty lines are no rows
    _write(folder / "b" / "c.ndjson.gz", b"".join(lines[40:80]))
    _write(folder / "b" / "d.jsonl.zst", b"".join(lines[80:]).rstrip(b"\n"))
    _write(folder / ".hidden" / "e.jsonl", b"not JSON")
    _write(folder / "picture.png", b"no text")
    for inputs in (["2.parquet"], ["folder"], ["folder/a.jsonl", "folder/b"]):
        found = _prepare(tmp_path, *(tmp_path / name for name in inputs), tokenizer=byte_level_file)
        assert found == first, inputs
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["split"]["train_documents"] + meta["split"]["val_documents"] == len(TEXTS)


def test_field_option_names_another_column(tmp_path):
    first = _prepare(tmp_path, _write(tmp_path / "1.jsonl", _rows(TEXTS)))
    _write(tmp_path / "2.jsonl", _rows(TEXTS).replace(b'"text"', b'"body"').replace(b'"n"', b'"text"'))
    _parquet(tmp_path / "3.parquet", TEXTS, column="body")
    for name in ("2.jsonl", "3.parquet"):
        assert _prepare(tmp_path, tmp_path / name, flags=("--field=body",)) == first


def test_folder_files_are_documents(tmp_path, byte_level_file, small_units):
    for n, text in enumerate(TEXTS):
        _write(tmp_path / "texts" / f"{n:03}.txt", text.encode())
    rows = _prepare(tmp_path, _write(tmp_path / "1.jsonl", _rows(TEXTS)), tokenizer=byte_level_file)
    assert _prepare(tmp_path, tmp_path / "texts", tokenizer=byte_level_file) == rows
    # Without an end-of-text token a document ends in a newline.
    train, val = _prepare(tmp_path, tmp_path / "texts", tokenizer="byte")
    found = np.frombuffer(train + val, "<u2").astype(np.uint8).tobytes().decode()
    assert sorted(found.split("\n")) == sorted("\n".join(t for t in TEXTS if t).split("\n") + [""])
    chars = _prepare(tmp_path, tmp_path / "texts", tokenizer="char")
    alphabet = sorted(set("".join(TEXTS) + "\n"))
    assert open_token_files(tmp_path / "out").tokenizer.chars == "".join(alphabet)
    assert "".join(alphabet[n] for n in np.frombuffer(chars[0] + chars[1], "<u2")) == found


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("tokenizer", ["char", "file"])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "texts", "zst"])
def test_every_format_continues_after_a_stop(tmp_path, monkeypatch, small_units, byte_level_file, form, tokenizer):
    inputs = tmp_path / "in"
    if form == "parquet":
        inputs.mkdir()
        _parquet(inputs / "a.parquet", TEXTS[:70], row_group_size=20)
        _parquet(inputs / "b.parquet", TEXTS[70:], row_group_size=20)
    elif form.startswith("jsonl"):
        _write(inputs / f"a.{form}", _rows(TEXTS[:70]))
        _write(inputs / f"b.{form}", _rows(TEXTS[70:]))
    elif form == "texts":
        for n, text in enumerate(["\n".join(TEXTS[k::3]) for k in range(3)] + ["tiny", "", "tiny"]):
            _write(inputs / f"{n}.txt", text.encode())
    else:
        inputs = _write(tmp_path / "in.txt.zst", "\n".join(TEXTS).encode())
    name = byte_level_file if tokenizer == "file" else tokenizer
    flags = ("--val_fraction=0.5",)
    whole = _prepare(tmp_path, inputs, tokenizer=name, flags=flags)
    meta = (tmp_path / "out" / "meta.json").read_bytes()
    commit, commits = writing.TokenWriter.commit, []

    def failing(writer, state):
        commit(writer, state)
        commits.append(state)
        if len(commits) % 2 == 0:
            raise _Stopped

    monkeypatch.setattr(writing.TokenWriter, "commit", failing)
    stops, again = 0, None
    while again is None:
        try:
            again = _prepare(tmp_path, inputs, tokenizer=name, flags=flags)
        except _Stopped:
            stops += 1
    assert stops >= 2
    assert again == whole and (tmp_path / "out" / "meta.json").read_bytes() == meta


def _broken_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(os.urandom(5000))[:-900])


def _broken_zst(path: Path) -> None:
    _zst(path, os.urandom(5000))
    path.write_bytes(path.read_bytes()[:-900])


ROWS = _rows(["one", "two"])
BAD = {
    "broken JSON": ("a.jsonl", lambda p: p.write_bytes(ROWS + b'{"text": "x\n'), ["a.jsonl, line 3 is not JSON"]),
    "no field": ("a.jsonl", lambda p: p.write_bytes(ROWS + b'{"body": "x"}'), ["line 3", "body", "--field"]),
    "a list": ("a.jsonl", lambda p: p.write_bytes(b"[1]"), ["line 1", "object"]),
    "a number": ("a.jsonl", lambda p: p.write_bytes(b'{"text": 3}'), ["line 1", "no text"]),
    "half a pair": ("a.jsonl", lambda p: p.write_bytes(ROWS + b'{"text": "a\\ud800"}'), ["line 3", "surrogate"]),
    "not UTF-8": ("a.jsonl", lambda p: p.write_bytes(ROWS + b'{"text": "\xff"}'), ["line 3", "UTF-8", "0xFF"]),
    "deep": ("a.jsonl", lambda p: p.write_bytes(b"[" * 10**6), ["line 1 is not JSON"]),
    "text": ("a.txt", lambda p: p.write_bytes(b"abc" * 9 + b"\xff"), ["a.txt is not UTF-8 text (byte 27 is 0xFF)"]),
    "gz": ("a.txt.gz", _broken_gz, ["a.txt.gz is damaged"]),
    "no gz": ("a.jsonl.gz", lambda p: p.write_bytes(ROWS), ["a.jsonl.gz is damaged"]),
    "zst": ("a.zst", _broken_zst, ["a.zst is damaged"]),
    "parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1" + b"x" * 99), ["a.parquet is damaged"]),
    "column": ("a.parquet", lambda p: _parquet(p, ["x"], column="body"), ["text columns: body", "--field"]),
    "null": ("a.parquet", lambda p: _parquet(p, ["x", None]), ["a.parquet, row 2"]),
    "empty": ("a.txt", lambda p: p.write_bytes(b""), ["no text in it"]),
    "empty gz": ("a.gz", lambda p: p.write_bytes(gzip.compress(b"")), ["no text in it"]),
    "one row": ("a.jsonl", lambda p: p.write_bytes(_rows(["a"])), ["none of the 1 documents", "--val_fraction"]),
    "one character": ("a.txt", lambda p: p.write_bytes(b"a"), ["too short to split"]),
    "nothing there": ("a.txt", lambda p: None, ["a.txt: no such file or folder"]),
    "empty folder": ("folder", lambda p: p.mkdir(), ["no text files"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, tmp_path, refused):
    name, write, mentions = BAD[case]
    write(tmp_path / name)
    before = sorted(os.listdir(tmp_path))
    refused(prepare.main, tmp_path / name, f"--out={tmp_path / 'out'}", "--tokenizer=char", mentions=mentions)
    assert sorted(os.listdir(tmp_path)) == before


def test_huge_row_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(documents, "MAX_ROW_BYTES", 1 << 20)
    path = _write(tmp_path / "a.jsonl", _rows(["x" * (1 << 20)]))
    assert "line 1 is longer than 1 MiB" in refused(prepare.main, path, f"--out={tmp_path / 'out'}", "--tokenizer=byte")


def test_wrong_options_are_refused(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = _write(tmp_path / "a.txt", b"some text")
    assert "--out" in refused(prepare.main, text)
    assert "name what to prepare: shakespeare_char" in refused(prepare.main, "--out=out")
    assert "--val_fraction 1.0" in refused(prepare.main, text, "--out=out", "--val_fraction=1.0")
    assert "--workers 0" in refused(prepare.main, text, "--out=out", "--workers=0")
    assert "--tokenizer word" in refused(prepare.main, text, "--out=out", "--tokenizer=word")
    assert "cannot be combined" in refused(prepare.main, "shakespeare", text, "--out=out")
    assert "--from a.txt" in refused(prepare.main, text, "--out=out", "--from=a.txt")
    assert "a.txt is a file" in refused(prepare.main, text, "--out=a.txt", "--tokenizer=byte")
    _write(tmp_path / "mine" / "thesis.tex", b"x")
    assert "holds files other than token files" in refused(prepare.main, text, "--out=mine", "--tokenizer=byte")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "mine", "thesis.tex"]


def test_inputs_from_yaml_and_after_flags(tmp_path):
    text = _write(tmp_path / "a.txt", b"some text" * 9)
    first = _prepare(tmp_path, text)
    _write(tmp_path / "a.yaml", f"inputs: [{text}]\nout: {tmp_path / 'other'}\ntokenizer: byte\n".encode())
    prepare.main([f"--config={tmp_path / 'a.yaml'}"])
    assert _tokens(tmp_path / "other") == first
    prepare.main(["--out", str(tmp_path / "third"), "--tokenizer", "byte", str(text)])
    assert _tokens(tmp_path / "third") == first


def test_concurrent_write_is_refused(tmp_path, refused):
    text = _write(tmp_path / "a.txt", b"some text" * 100)
    with writing.TokenWriter(tmp_path / "out", job={}):
        error = refused(prepare.main, text, f"--out={tmp_path / 'out'}", "--tokenizer=byte")
    assert "being written by another process" in error


@pytest.fixture
def shakespeare(tmp_path, monkeypatch) -> bytes:
    """A substitute for tiny Shakespeare, and an empty cache."""
    content = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 30
    monkeypatch.setattr(sets, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    return content


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch, shakespeare, refused):
    fetched = []

    def fetch(url, timeout):
        fetched.append(url)
        return io.BytesIO(shakespeare)

    monkeypatch.setattr(sets, "urlopen", fetch)
    for _ in range(2):
        prepare.main(["shakespeare_char", f"--out={tmp_path / 'out'}"])
    assert fetched == [sets.SHAKESPEARE_URL]
    assert open_token_files(tmp_path / "out").train_tokens == int(0.9 * len(shakespeare))
    wrong = _write(tmp_path / "wrong.txt", shakespeare[:-1])
    assert "is not the text of tiny Shakespeare" in refused(
        prepare.main, "shakespeare_char", f"--from={wrong}", f"--out={tmp_path / 'no'}"
    )
    right = _write(tmp_path / "right.txt", shakespeare)
    first = _tokens(tmp_path / "out")
    prepare.main(["shakespeare_char", "--from", str(right), f"--out={tmp_path / 'out'}"])
    assert _tokens(tmp_path / "out") == first


def test_missing_network_is_refused_with_a_hint(tmp_path, monkeypatch, shakespeare, refused):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(sets, "urlopen", unreachable)
    monkeypatch.setattr(sets.socket, "create_connection", unreachable)
    error = refused(prepare.main, "shakespeare_char", f"--out={tmp_path / 'out'}")
    assert sets.SHAKESPEARE_URL in error and "--from FILE" in error and "tinyshakespeare.txt" in error
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    error = refused(prepare.main, "openwebtext", f"--out={tmp_path / 'out'}")
    assert "huggingface.co cannot be reached" in error and "--from FOLDER" in error
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "requirements/data.txt" in refused(prepare.main, "openwebtext", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


class _Streamed(list):
    """A fake streamed data set."""

    def skip(self, count):
        return _Streamed(self[count:])


class _Lost(_Streamed):
    """A fake streamed data set whose connection breaks."""

    def __iter__(self):
        for number, row in enumerate(super().__iter__()):
            if number == 110:
                raise RuntimeError("the line is dead")
            yield row


def test_openwebtext_from_the_hub_and_from_a_file(tmp_path, monkeypatch, small_units, refused, capsys):
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda name, split, streaming: _Streamed({"text": text} for text in TEXTS)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(sets.socket, "create_connection", lambda *args, **kwargs: io.BytesIO())
    flags = ("--val_fraction=0.1",)
    error = refused(prepare.main, "openwebtext", f"--out={tmp_path / 'out'}", "--tokenizer=byte", *flags)
    assert f"returned {len(TEXTS)} rows instead of 8,013,769" in error
    monkeypatch.setattr(sets, "OPENWEBTEXT_ROWS", len(TEXTS))
    rows = _prepare(tmp_path, _write(tmp_path / "a.jsonl", _rows(TEXTS)), flags=flags)
    assert _prepare(tmp_path, "openwebtext", "--from", tmp_path / "a.jsonl", flags=flags) == rows
    hub.load_dataset = lambda name, split, streaming: _Lost({"text": text} for text in TEXTS)
    error = refused(prepare.main, "openwebtext", f"--out={tmp_path / 'out'}", "--tokenizer=byte", *flags)
    assert "the line is dead" in error and "to continue" in error
    hub.load_dataset = lambda name, split, streaming: _Streamed({"text": text} for text in TEXTS)
    capsys.readouterr()
    assert _prepare(tmp_path, "openwebtext", flags=flags) == rows
    assert "continuing an interrupted" in capsys.readouterr().err


def test_train_data_accepts_rows(tmp_path, small_units, monkeypatch):
    from lightning_gpt.data.tokens.preparation import prepare as open_data

    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    _write(tmp_path / "plain.txt", "".join(f"{text}\n" for text in TEXTS if text).encode())
    _write(tmp_path / "rows.jsonl.gz", _rows(TEXTS))
    plain, rows = (open_data(str(tmp_path / n), tokenizer="char", block_size=8) for n in ("plain.txt", "rows.jsonl.gz"))
    assert plain.folder == rows.folder
    joined = "".join(f"{text}\n" for text in TEXTS if text)
    assert plain.tokenizer.decode(plain.tokens("train")) == joined[: int(0.9 * len(joined))]
    assert plain.tokenizer.decode(plain.tokens("val")) == joined[int(0.9 * len(joined)) :]
