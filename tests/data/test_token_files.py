"""Token files: format, cache, nanoGPT's folders, and one-line errors."""

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.tokens import token_files
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.data.tokens.token_files import open_token_files, write_token_files
from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, caf\u00e9 \U0001f600.\n" * 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "input.txt")


def _write(folder: Path, **changes) -> Path:
    settings = {
        "train": np.arange(100) % 65,
        "val": np.arange(20) % 65,
        "tokenizer": None,
        "vocab_size": 65,
        "source": "x",
    }
    write_token_files(folder, **(settings | changes))
    return folder


def _nanogpt(folder: Path, meta: object = None) -> Path:
    folder.mkdir()
    np.array([0, 1, 2, 1], dtype=np.uint16).tofile(folder / "train.bin")
    np.array([2, 1], dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_files_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    train = np.array([0, 1, vocab_size - 1])
    tokenizer = CharTokenizer("ab\u00e9")
    folder = _write(
        tmp_path / "tokens", train=train, vocab_size=vocab_size, tokenizer=tokenizer, train_bytes=4, source="here"
    )
    files = open_token_files(folder)
    assert (files.dtype, files.vocab_size, files.source) == (dtype, vocab_size, "here")
    assert (files.train_tokens, files.val_tokens, files.train_bytes, files.val_bytes) == (3, 20, 4, None)
    assert files.tokenizer.to_dict() == tokenizer.to_dict()
    assert isinstance(files.tokens("train"), np.memmap)
    assert files.tokens("train").tolist() == train.tolist()
    assert not files.tokens("train").flags.writeable
    assert (folder / "train.bin").read_bytes() == train.astype("<u2" if dtype == "uint16" else "<u4").tobytes()
    again = pickle.loads(pickle.dumps(files))
    assert pickle.loads(pickle.dumps(again.opener("val")))().tolist() == list(range(20))


def test_failed_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path / "tokens")
    _write(folder, source="replaced")
    assert open_token_files(folder).source == "replaced"

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full_disk)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match="No space left"):
            _write(target, source="failed")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["tokens"]
    assert open_token_files(folder).source == "replaced"


def test_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files other than token files"):
        _write(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(("tokenizer", "name"), [(None, "char"), ("char", "char"), ("byte", "byte")])
def test_prepare_splits_by_characters(text_file: str, tokenizer: str | None, name: str) -> None:
    files = prepare(text_file, tokenizer=tokenizer, block_size=8)
    cut = int(0.9 * len(TEXT))
    assert files.tokenizer.name == name
    assert files.tokenizer.decode(files.tokens("train")) == TEXT[:cut]
    assert files.tokenizer.decode(files.tokens("val")) == TEXT[cut:]
    assert (files.train_bytes, files.val_bytes) == (len(TEXT[:cut].encode()), len(TEXT[cut:].encode()))


@pytest.mark.usefixtures("gpt2_tables")
def test_prepare_gpt2(text_file: str) -> None:
    files = prepare(text_file, tokenizer="gpt2", block_size=8)
    assert files.vocab_size == 50257
    assert files.tokenizer.decode(files.tokens("train")) == TEXT[: int(0.9 * len(TEXT))]


def test_prepare_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"\xff\x00" * 500)
    files = prepare(str(tmp_path / "data.bin"), tokenizer="byte", block_size=8)
    assert (files.train_tokens, files.val_tokens) == (900, 100)
    with pytest.raises(UserError, match="not UTF-8.*--tokenizer byte"):
        prepare(str(tmp_path / "data.bin"), tokenizer="char", block_size=8)


def test_prepare_reuses_the_cache(text_file: str, tmp_path: Path, cache: Path) -> None:
    def snapshot() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(cache.rglob("*"))}

    first = prepare(text_file, tokenizer=None, block_size=8)
    before = snapshot()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    assert prepare(str(copy), tokenizer="char", block_size=16).folder == first.folder
    assert snapshot() == before
    assert prepare(text_file, tokenizer="byte", block_size=8).folder != first.folder
    Path(text_file).write_text("other" * 100)
    assert prepare(text_file, tokenizer=None, block_size=8).folder != first.folder


def test_cached_text_has_the_name_under_which_it_is_asked_for(text_file: str, tmp_path: Path) -> None:
    copy = shutil.copy(text_file, tmp_path / "copy.txt")
    first, second = (prepare(str(path), tokenizer=None, block_size=8) for path in (text_file, copy))
    assert first.folder == second.folder
    assert (first.source, second.source) == (str(text_file), str(copy))


def test_prepare_replaces_a_damaged_cache(text_file: str) -> None:
    files = prepare(text_file, tokenizer=None, block_size=8)
    expected = files.tokens("train").tolist()
    files.path("train").write_bytes(b"\0\0")
    assert prepare(text_file, tokenizer=None, block_size=8).tokens("train").tolist() == expected


def _count_writes(text_file: str, log: str) -> None:
    from lightning_gpt.data.tokens import preparation

    write = preparation.write_corpus

    def counted(*args, **kwargs) -> None:
        with open(log, "a") as file:
            file.write("w")
        write(*args, **kwargs)

    preparation.write_corpus = counted
    prepare(text_file, tokenizer="byte", block_size=8)


def test_concurrent_processes_tokenize_once(text_file: str, tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("forks processes")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_writes, args=(text_file, str(tmp_path / "writes"))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "writes").read_text() == "w"


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("LIGHTNING_GPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/lightning_gpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/lightning_gpt")


def test_cache_dir_argument_replaces_the_default(text_file: str, tmp_path: Path, cache: Path) -> None:
    files = prepare(text_file, tokenizer=None, block_size=8, cache_dir=tmp_path / "mine")
    assert files.folder.is_relative_to(tmp_path / "mine")
    assert not cache.exists()


def test_unwritable_cache_is_refused(text_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", text_file)
    with pytest.raises(UserError, match="cannot be written.*LIGHTNING_GPT_CACHE"):
        prepare(text_file, tokenizer=None, block_size=8)
    folder = _write(tmp_path / "tokens")
    assert prepare(str(folder), tokenizer=None, block_size=8).vocab_size == 65


def test_prepare_opens_a_token_folder(tmp_path: Path) -> None:
    folder = _write(tmp_path / "tokens", tokenizer=ByteTokenizer(), vocab_size=256)
    assert prepare(str(folder), tokenizer=None, block_size=8).folder == folder
    assert prepare(str(folder), tokenizer="byte", block_size=8).folder == folder
    with pytest.raises(UserError, match="--tokenizer gpt2 does not fit .* whose tokenizer is byte"):
        prepare(str(folder), tokenizer="gpt2", block_size=8)
    with pytest.raises(UserError, match="choose from char, byte, gpt2"):
        prepare(str(folder), tokenizer="word", block_size=8)


def test_nanogpt_folder_with_characters(tmp_path: Path) -> None:
    meta = {"vocab_size": 3, "itos": dict(enumerate("\nab")), "stoi": {c: i for i, c in enumerate("\nab")}}
    files = open_token_files(_nanogpt(tmp_path / "shakespeare_char", meta))
    assert (files.vocab_size, files.train_tokens, files.val_tokens) == (3, 4, 2)
    assert files.tokenizer.decode(files.tokens("train")) == "\naba"
    assert files.train_bytes is None


@pytest.mark.parametrize("itos", [None, ["a", "b", "c"], {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "cc"}])
def test_nanogpt_folder_with_another_vocabulary(tmp_path: Path, itos: object) -> None:
    files = open_token_files(_nanogpt(tmp_path / "tokens", {"vocab_size": 3, "itos": itos}))
    assert files.tokenizer is None
    assert files.vocab_size == 3


def test_nanogpt_folder_without_meta_is_gpt2(tmp_path: Path) -> None:
    files = open_token_files(_nanogpt(tmp_path / "openwebtext"))
    assert (files.vocab_size, files.tokenizer.name) == (50257, "gpt2")


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_refused(tmp_path: Path) -> None:
    folder = _nanogpt(tmp_path / "tokens", {"vocab_size": 3, "itos": _Malicious(tmp_path / "pwned")})
    with pytest.raises(UserError, match=r"meta\.pkl is refused: it refers to posix\.mkdir"):
        open_token_files(folder)
    assert not (tmp_path / "pwned").exists()
    (folder / "meta.pkl").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="refused"):
        open_token_files(folder)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": "3"}))
    with pytest.raises(UserError, match="no vocab_size"):
        open_token_files(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_token_files_are_refused(tmp_path: Path, split: str) -> None:
    folder = _write(tmp_path / "tokens")
    path = folder / f"{split}.bin"
    whole = path.read_bytes()
    for content, message in (
        (b"", f"{split}.bin is empty"),
        (whole + b"\0", f"{split}.bin has {len(whole) + 1} bytes, not a whole number of 2-byte tokens"),
        (whole[:-2], f"{split}.bin has {len(whole) // 2 - 1} tokens, but meta.json says {len(whole) // 2}"),
        (
            whole[:24] + b"\x46\0" + whole[26:],
            f"{split}.bin holds token 70 at position 12, but the vocabulary has 65 symbols",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_token_files(folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=rf"has no {split}\.bin"):
        prepare(str(folder), tokenizer=None, block_size=8)


def test_scan_reads_chunks_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", 7)
    folder = _write(tmp_path / "tokens")
    open_token_files(folder)
    assert len(list((cache / "checked").iterdir())) == 2
    path = folder / "train.bin"
    stat = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[180] = 70
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="token 70 at position 90"):
        open_token_files(folder)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_token_files(folder)  # same size and time: the tokens were not read again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"train_bytes": -1}, "train_bytes is -1"),
        ({"format": 99}, "format 1"),
        ({"tokenizer": {"name": "word"}}, "word is not known"),
        ({"tokenizer": 3}, "saved tokenizer"),
    ],
)
def test_damaged_meta_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folder = _write(tmp_path / "tokens")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=message):
        open_token_files(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_token_files(folder)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("ab" * 20)
    with pytest.raises(UserError, match="training split has 36 tokens, but --block_size 64 needs at least 65"):
        prepare(str(path), tokenizer=None, block_size=64)
    path.write_text("ababababab")
    with pytest.raises(UserError, match="validation split has 1 token, but needs at least 2"):
        prepare(str(path), tokenizer=None, block_size=4)
    path.write_text("a")
    with pytest.raises(UserError, match="too short to split"):
        prepare(str(path), tokenizer=None, block_size=4)
