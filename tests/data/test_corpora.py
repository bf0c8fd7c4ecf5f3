"""Corpora: which files are read, in which order, and one-line errors."""

from pathlib import Path

import pytest

from lightning_gpt.config import UserError
from lightning_gpt.data.text import corpora
from lightning_gpt.data.text.corpora import Corpus, load_corpus
from lightning_gpt.data.tokens.token_files import is_token_folder


def _content(corpus: Corpus) -> bytes:
    return b"".join(block.data for block in corpus.joined())


def test_stdlib_is_large_ascii_library_code() -> None:
    corpus = load_corpus("stdlib")
    assert corpus.source.startswith("stdlib (Python 3.")
    content = _content(corpus)
    assert len(content) > 4_000_000
    assert content.isascii()
    assert b"class TestProgram(" in content  # unittest is part of the library, not a test
    assert b"class BaseTestUUID" not in content


def _library(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}")


def test_stdlib_selection_and_order_are_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["a.py", "b.py", "json/c.py", "zoo/d.py", "e.py"]
    dropped = ["test/x.py", "json/tests/x.py", "site-packages/x.py", "idlelib/idle_test/x.py", "x.txt"]
    contents = []
    for folder, names in (("one", kept + dropped), ("two", (kept + dropped)[::-1])):
        _library(tmp_path / folder, names)
        (tmp_path / folder / "accents.py").write_text("# \u00e9", encoding="utf-8")
        monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name, f=folder: str(tmp_path / f))
        contents.append(_content(load_corpus("stdlib")))
    assert contents[0] == contents[1]
    lines = contents[0].decode().splitlines()
    assert sorted(lines) == sorted(f"# {name}" for name in kept)
    assert lines != sorted(lines)


def test_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "any.data").write_bytes(b"a\r\n\xff")
    corpus = load_corpus(str(tmp_path / "any.data"))
    assert _content(corpus) == b"a\r\n\xff"
    assert corpus.source == str(tmp_path / "any.data")


def test_folder_joins_its_text_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "b",
        "a.md": "a\n",
        "sub/c.PY": "c",
        "empty.txt": "",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "picture.png": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "folder.txt").mkdir()
    assert _content(load_corpus(str(tmp_path))) == b"a\nb\nc\n"


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no such file or folder"):
        load_corpus(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_corpus("a" * 300)
    with pytest.raises(UserError, match="no such file or folder"):  # not the current folder
        load_corpus("")
    assert not is_token_folder(Path("a" * 300))
    with pytest.raises(UserError, match="no text files"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no text in it"):
        load_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no text in it"):
        load_corpus(str(tmp_path))
