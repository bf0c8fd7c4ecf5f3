"""prepare.py: tokens and splits do not depend on threads, piece sizes or interruptions."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train
from lightning_gpt.data.tokens import encoding, tokenizing, writing
from lightning_gpt.data.tokens.encoding import Position, Span, pieces
from lightning_gpt.data.tokens.token_files import open_token_files
from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer, build_tokenizer

REPO = Path(__file__).parents[2]
# White space and characters that tokenizer patterns distinguish.
TRICKY = st.text(alphabet=" \t\r\n\u00a0ab'sB1.!\u00e9\u0301\u65e5\U0001f600", max_size=60)


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """Write 150 kB of text with lines, empty lines, indentation and characters of one to four bytes."""
    draw = random.Random(1)
    words = "the Cat sat, on it's  mat\u00e9 \u65e5\u672c \U0001f600 1234 <|endoftext|> don't --- x".split(" ")
    lines = (" " * draw.randrange(3) + " ".join(draw.choices(words, k=draw.randrange(14))) for _ in range(3000))
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    return file


@pytest.fixture
def small_units(monkeypatch) -> None:
    """Make units small and commit each, so that a small text exercises the code paths of a large one."""
    monkeypatch.setattr(encoding, "UNIT_BYTES", 2000)
    monkeypatch.setattr(tokenizing, "COMMIT_SECONDS", 0.0)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _gpt2_reference(text: str) -> bytes:
    import tiktoken

    return np.array(tiktoken.get_encoding("gpt2").encode_ordinary(text), dtype="<u2").tobytes()


@pytest.mark.usefixtures("gpt2_tables")
def test_gpt2_tokens_and_split_equal_nanogpt(story, tmp_path, small_units, capsys):
    text = story.read_bytes().decode()
    cut = int(len(text) * 0.9)
    expected = _gpt2_reference(text[:cut]), _gpt2_reference(text[cut:])
    for workers in (1, 3):
        out = tmp_path / "out"
        prepare.main([str(story), f"--out={out}", f"--workers={workers}"])
        found = _files(out)
        assert list(found) == ["meta.json", "train.bin", "val.bin"]
        assert (found["train.bin"], found["val.bin"]) == expected
    printed = capsys.readouterr().out
    assert f"{len(expected[0]) // 2:,} tokens" in printed and "by tail" in printed
    assert os.listdir(tmp_path) == ["out"]


def test_characters_and_split_equal_nanogpt(story, tmp_path, small_units):
    text = story.read_bytes().decode()
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype="<u2")
    prepare.main([str(story), f"--out={tmp_path / 'out'}", "--tokenizer=char", "--val_fraction=0.25"])
    found = _files(tmp_path / "out")
    cut = int(len(text) * 0.75)
    assert (found["train.bin"], found["val.bin"]) == (ids[:cut].tobytes(), ids[cut:].tobytes())
    meta = json.loads(found["meta.json"])
    assert (
        meta.items()
        >= {
            "vocab_size": len(chars),
            "dtype": "uint16",
            "split": {"by": "tail", "val_fraction": 0.25},
            "rough_cuts": 0,
            "train_bytes": len(text[:cut].encode()),
            "val_bytes": len(text[cut:].encode()),
        }.items()
    )
    assert open_token_files(tmp_path / "out").tokenizer.decode(ids[:99]) == text[:99]


def test_bytes_that_are_not_utf8_are_split_by_bytes(tmp_path):
    (tmp_path / "noise.bin").write_bytes(b"\xff\x00\x80" * 100)
    prepare.main([str(tmp_path / "noise.bin"), f"--out={tmp_path / 'out'}", "--tokenizer=byte"])
    assert open_token_files(tmp_path / "out").train_tokens == 270


def test_documents_are_drawn_and_end_in_end_of_text(tmp_path, byte_level_file, small_units):
    texts = [f"document {n}\n" + "the cat sat. " * (n % 50) for n in range(300)]
    texts[7] = ""
    texts[8] = "the cat <|endoftext|> sat\n" * 400  # longer than a unit, and a special token as text
    rows = _rows(tmp_path / "rows.jsonl", texts)
    tokenizer = build_tokenizer(str(byte_level_file), corpus=None, source="x")
    found = {}
    for seed, workers in ((1, 1), (1, 4), (2, 2)):
        out = tmp_path / "out"
        flags = [f"--seed={seed}", f"--workers={workers}", "--val_fraction=0.2", f"--tokenizer={byte_level_file}"]
        prepare.main([str(rows), f"--out={out}", *flags])
        files = open_token_files(out)
        assert found.setdefault(seed, _files(out)) == _files(out)
    # The draw cannot be repeated independently. Check that each document is in one split, whole and in order.
    for seed in found:
        splits = {}
        for name in ("train.bin", "val.bin"):
            ids = np.frombuffer(found[seed][name], "<u2")
            ends = np.flatnonzero(ids == tokenizer.end_of_text)
            assert ends[-1] == len(ids) - 1
            documents = [part[:-1].tolist() for part in np.split(ids, ends + 1)[:-1]]
            splits[name] = documents
        whole = [tokenizer.encode(text).tolist() for text in texts]
        rest = {name: iter(documents) for name, documents in splits.items()}
        heads = {name: next(documents) for name, documents in rest.items()}
        drawn = []
        for document in whole:
            name = next(name for name in heads if heads[name] == document)
            drawn.append(name)
            heads[name] = next(rest[name], None)
        assert heads == {"train.bin": None, "val.bin": None}
        assert 30 <= drawn.count("val.bin") <= 90
        split = json.loads(found[seed]["meta.json"])["split"]
        assert split == {
            "by": "document",
            "val_fraction": 0.2,
            "seed": seed,
            "train_documents": drawn.count("train.bin"),
            "val_documents": drawn.count("val.bin"),
        }
    assert found[1]["val.bin"] != found[2]["val.bin"]
    assert files.tokenizer.to_dict() == tokenizer.to_dict()


def test_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{n}": n for n in range(65_537)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{65_536 - n}" for n in range(100)))
    prepare.main([str(tmp_path / "text.txt"), f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'words.json'}"])
    files = open_token_files(tmp_path / "out")
    assert files.dtype == "uint32"
    assert files.tokens("train")[:3].tolist() == [65_536, 65_535, 65_534]


@given(TRICKY, st.integers(1, 20), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_pieces_have_the_tokens_of_the_whole_text(byte_level_file, text, unit, block):
    data = text.encode()
    blocks = [data[start : start + block] for start in range(0, len(data), block)] or [b""]
    byte_level = build_tokenizer(str(byte_level_file), corpus=None, source="x")
    for tokenizer in (byte_level, ByteTokenizer(), CharTokenizer("".join(sorted(set(text) | {"x"})))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "UNIT_BYTES", unit)
            patch.setattr(encoding, "_AHEAD_BYTES", 2)
            last = len(blocks) - 1
            spans = [Span(b, "train", n == last, n == last, "x", n * block, 0) for n, b in enumerate(blocks)]
            cut = list(pieces(spans, tokenizer=tokenizer, start=Position(0, 0)))
        tokens = [tokenizer.encode_bytes(piece.data, source="x") for piece in cut]
        assert np.array_equal(np.concatenate(tokens), tokenizer.encode(text))
        assert [piece.ends_text for piece in cut] == [False] * (len(cut) - 1) + [True]
        assert cut[-1].after == (1, 0)


def test_text_without_cuts_is_cut_roughly_and_reported(tmp_path, monkeypatch, capsys, byte_level_file):
    monkeypatch.setattr(encoding, "UNIT_BYTES", 1000)
    monkeypatch.setattr(encoding, "LIMIT_BYTES", 8000)
    monkeypatch.setattr(encoding, "_AHEAD_BYTES", 10)
    text = "\u65e5\u672c" * 9000 + " the cat" * 2000
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    prepare.main([str(tmp_path / "line.txt"), f"--out={tmp_path / 'out'}", f"--tokenizer={byte_level_file}"])
    files = open_token_files(tmp_path / "out")
    cuts = json.loads((tmp_path / "out" / "meta.json").read_text())["rough_cuts"]
    assert 7 <= cuts <= 10
    assert f"{cuts} cuts where" in capsys.readouterr().out
    ids = np.concatenate([files.tokens("train"), files.tokens("val")])
    assert files.tokenizer.decode(ids) == text


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("tokenizer", ["char", "byte", "file"])
def test_prepare_continues_after_a_stop_anywhere(story, tmp_path, monkeypatch, small_units, tokenizer, byte_level_file):
    name = str(byte_level_file) if tokenizer == "file" else tokenizer
    monkeypatch.setattr(encoding, "UNIT_BYTES", 3000)
    command = [str(story), "--workers=2", f"--tokenizer={name}"]
    prepare.main([*command, f"--out={tmp_path / 'whole'}"])
    appended, append, starts = [], writing.TokenWriter.append, []

    def failing(writer, split, tokens):
        starts.append(writer.resumed)
        append(writer, split, tokens[: len(tokens) // 2])
        appended.append(split)
        if len(appended) % 7 == 0:
            raise _Stopped
        append(writer, split, tokens[len(tokens) // 2 :])

    monkeypatch.setattr(writing.TokenWriter, "append", failing)
    stops = 0
    while True:
        try:
            prepare.main([*command, f"--out={tmp_path / 'out'}"])
            break
        except _Stopped:
            stops += 1
            assert not (tmp_path / "out").exists()
    assert stops >= 8 and starts[-1]
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


# Script: run prepare.py, and kill this process after some commits. Arguments: their number, and prepare.py's.
_KILLED = """
import os, signal, sys
import prepare
from lightning_gpt.data.tokens import encoding, tokenizing, writing

encoding.UNIT_BYTES = tokenizing.UNIT_BYTES = 50_000
tokenizing.COMMIT_SECONDS = 0
commit, left = writing.TokenWriter.commit, int(sys.argv[1])

def counted(*args):
    global left
    commit(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

writing.TokenWriter.commit = counted
prepare.main(sys.argv[2:])
"""


def test_prepare_continues_after_a_kill(story, tmp_path):
    out, long = tmp_path / "out", tmp_path / "long.txt"
    long.write_bytes(story.read_bytes() * 20)
    command, options = [sys.executable, "-c", _KILLED], [str(long), "--tokenizer=byte"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    killed = subprocess.run([*command, "12", *options, f"--out={out}"], env=environment)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    journal = tmp_path / ".out.partial" / "journal.json"
    assert json.loads(journal.read_text())["sizes"]["train"] > 400_000
    again = [*command, "0", *options, f"--out={out}"]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, check=True)
    assert "continuing an interrupted run" in done.stderr
    prepare.main([*options, f"--out={tmp_path / 'whole'}"])
    assert _files(out) == _files(tmp_path / "whole")
    assert not journal.parent.exists()


def _stop_after(monkeypatch, commits: int) -> None:
    commit, done = writing.TokenWriter.commit, []

    def failing(writer, state):
        if len(done) == commits:
            raise _Stopped
        done.append(state)
        commit(writer, state)

    monkeypatch.setattr(writing.TokenWriter, "commit", failing)


def test_prepare_restarts_after_inputs_change(story, tmp_path, small_units, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(story.read_bytes())
    command = [str(text), f"--out={tmp_path / 'out'}", "--tokenizer=byte"]
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, commits=5)
        with pytest.raises(_Stopped):
            prepare.main(command)
    text.write_bytes(b"x" * 5000)
    prepare.main(command)
    assert "starting over" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"x\0" * 4500
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, commits=1)
        with pytest.raises(_Stopped):
            prepare.main(command)
    # The old folder stays until the new one is complete.
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"x\0" * 4500
    prepare.main([*command, "--val_fraction=0.5"])
    assert "starting over" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"x\0" * 2500


@pytest.mark.parametrize("change", [4000, -4000])
def test_text_that_changes_while_read_is_refused(story, tmp_path, small_units, monkeypatch, capsys, change):
    text, append = tmp_path / "text.txt", writing.TokenWriter.append
    text.write_bytes(story.read_bytes())

    def append_and_change(writer: writing.TokenWriter, split: writing.Split, tokens: bytes) -> None:
        os.truncate(text, len(story.read_bytes()) + change)
        append(writer, split, tokens)

    monkeypatch.setattr(writing.TokenWriter, "append", append_and_change)
    with pytest.raises(SystemExit):
        prepare.main([str(text), f"--out={tmp_path / 'out'}", "--tokenizer=byte"])
    assert "text.txt changed while it was read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("call", [1, 2])
def test_prepare_repeats_after_a_stop_during_the_swap(story, tmp_path, monkeypatch, call):
    command = [str(story), f"--out={tmp_path / 'out'}", "--tokenizer=byte"]
    prepare.main([*command, "--val_fraction=0.5"])
    replace, calls = os.replace, []

    def failing(source, target):
        if str(tmp_path / "out") in (str(source), str(target)):
            calls.append(target)
            if len(calls) == call:
                raise _Stopped
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(_Stopped):
            prepare.main(command)
    prepare.main(command)
    assert open_token_files(tmp_path / "out").val_tokens < 0.2 * story.stat().st_size
    assert os.listdir(tmp_path) == ["out"]


def test_prepare_continues_after_a_full_disk(story, tmp_path, monkeypatch, small_units, capsys):
    command = [str(story), f"--out={tmp_path / 'out'}", "--tokenizer=byte"]
    with pytest.MonkeyPatch.context() as patch:
        commit, done = writing.TokenWriter.commit, []

        def failing(writer, state):
            if len(done) == 4:
                raise OSError(28, "No space left on device")
            done.append(state)
            commit(writer, state)

        patch.setattr(writing.TokenWriter, "commit", failing)
        with pytest.raises(SystemExit) as stop:
            prepare.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == [".out.partial"]
    prepare.main(command)
    assert "continuing an interrupted" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]


def test_train_on_a_prepared_folder(story, tmp_path, tiny_flags, monkeypatch, capsys):
    prepare.main([str(story), f"--out={tmp_path / 'tokens'}", "--tokenizer=byte"])
    train.main([*tiny_flags, f"--data={tmp_path / 'tokens'}", f"--out_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


# Reads VmHWM, because getrusage would include the parent's memory.
_MEASURED = """
import re, sys
import prepare
prepare.main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def _long(path: Path, story: Path, megabytes: int) -> None:
    copies = megabytes * 1_000_000 // story.stat().st_size
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        text = story.read_text(encoding="utf-8")
        rows = [text[start : start + 3000] for start in range(0, len(text), 3000)] * copies
        options = {"row_group_size": len(rows), "compression": "none", "use_dictionary": False}
        parquet.write_table(pyarrow.table({"text": rows}), path, **options)
    else:
        with open(path, "wb") as file:
            for _ in range(copies):
                file.write(story.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from Linux")
@pytest.mark.parametrize(("name", "tokenizer"), [("a.txt", "char"), ("a.txt", "byte"), ("a.parquet", "byte")])
def test_memory_is_independent_of_the_text_size(story, tmp_path, name, tokenizer):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    peaks = []
    for megabytes in (30, 200):
        _long(tmp_path / name, story, megabytes)
        command = [sys.executable, "-c", _MEASURED, str(tmp_path / name), f"--out={tmp_path / 'out'}"]
        command += [f"--tokenizer={tokenizer}", "--workers=2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.rpartition("peak ")[2]) / 1024)
    assert peaks[1] < peaks[0] + 60 and peaks[1] < 600, peaks
