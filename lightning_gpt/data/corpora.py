"""What text to train on: a file, a folder of text files, or the standard library of the running Python."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_gpt.config import UserError

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .html .htm .xml .css .csv .tsv .json .jsonl .yaml .yml .toml .ini .cfg "
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .jsx .tsx .go .rs .rb .php .pl .sh .sql .r .jl .lua .scala "
    ".kt .swift .hs .ml .lean".split()
)
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """A text, whole and in memory.

    Attributes:
        source: Where it came from, for messages and `meta.json`.
        content: The text as bytes, usually UTF-8.
    """

    source: str
    content: bytes


def load_corpus(data: str) -> Corpus:
    """Load the text that `--data` names.

    `stdlib` is the ASCII-only Python source of the running interpreter's standard library without its tests: some
    megabytes of real text that every machine has. Its files are ordered by the hash of their names, so the tail that
    is split off for validation is a mixture. A file is taken byte for byte. A folder is searched recursively for text
    files (see `TEXT_SUFFIXES`; hidden ones are left out), which are joined by sorted path, each ending in a newline.

    Args:
        data: `stdlib`, a file, or a folder; write `./stdlib` for a file or folder of that name.

    Raises:
        UserError: Nothing there, nothing readable, or nothing in it.
    """
    if data == "stdlib":
        return _standard_library()
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"--data {data}: no such file or folder; give a text file, a folder of texts, stdlib or a task")
    return _corpus(str(path), _read(path))


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [name for name in files if _STDLIB_LEFT_OUT.isdisjoint(name.split("/"))]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    contents = (_read(files[name]) for name in names if files[name].is_file())
    return _corpus(f"stdlib (Python {platform.python_version()})", _joined(c for c in contents if c.isascii()))


def _folder(root: Path) -> Corpus:
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    names = sorted(
        name
        for name, path in files.items()
        if path.suffix.lower() in TEXT_SUFFIXES
        and not any(part.startswith(".") for part in name.split("/"))
        and path.is_file()
    )
    if not names:
        raise UserError(f"--data {root}: no text files (.txt, .md, .py, ...) in this folder")
    return _corpus(str(root), _joined(_read(files[name]) for name in names))


def _joined(contents: Iterable[bytes]) -> bytes:
    return b"".join(content if content.endswith(b"\n") else content + b"\n" for content in contents if content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror}") from error


def _corpus(source: str, content: bytes) -> Corpus:
    if not content:
        raise UserError(f"--data {source}: there is no text in it")
    return Corpus(source, content)
