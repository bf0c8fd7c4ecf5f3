"""Find the text to train on: files, folders, or the standard library of the running Python."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_gpt.config import UserError
from lightning_gpt.data.text.documents import (
    COMPRESSED,
    ROW_SUFFIXES,
    Block,
    Documents,
    FileDocuments,
    ending_in_newline,
    is_plain_text,
)

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .html .htm .xml .css .csv .tsv .json .yaml .yml .toml .ini .cfg "
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .jsx .tsx .go .rs .rb .php .pl .sh .sql .r .jl .lua .scala "
    ".kt .swift .hs .ml .lean".split()
)
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """Documents and their name.

    Attributes:
        source: Where the documents came from, for messages and `meta.json`.
        documents: The documents.
        is_one_text: Whether they are a single text file, which is read byte for byte.
    """

    source: str
    documents: Documents
    is_one_text: bool = False

    def joined(self, first: int = 0, offset: int = 0) -> Iterator[Block]:
        """Yield the documents as one text, each ending in a newline, from byte `offset` of document `first` on."""
        if self.is_one_text:
            return self.documents.blocks(first, offset)
        return ending_in_newline(self.documents, first, offset)


def load_corpus(data: str) -> Corpus:
    """Find the text that `--data` names.

    `stdlib` is the ASCII-only Python source of the interpreter's standard library without its tests: a few megabytes
    of real text that every machine has. Its files are ordered by the hash of their names, so that the validation tail
    is a mixture. Anything else is a path, see `find_corpus`.

    Args:
        data: `stdlib`, a file, or a folder. `./stdlib` means a file or folder.

    Raises:
        UserError: The path is missing, unreadable or has no text.
    """
    return _standard_library() if data == "stdlib" else find_corpus([data], flag="--data ")


def find_corpus(paths: Sequence[str], *, field: str = "text", flag: str = "") -> Corpus:
    """Find the documents in files and folders.

    A folder is searched recursively, by sorted path, for text files (see `TEXT_SUFFIXES`), JSON lines and Parquet;
    hidden files are skipped. A file that is given by its path may have any name; without the suffix .jsonl, .ndjson or
    .parquet it is a text.

    Args:
        paths: The files and folders.
        field: The field or column that holds a row's text.
        flag: Prefix of a path in error messages.

    Raises:
        UserError: A path is missing, unreadable or has no text.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if name and os.path.isdir(path):  # Path("") is the current folder
            files += _in_folder(path, flag)
        elif name and os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"{flag}{name}: no such file or folder; give a text file, or a folder of text files")
    source = ", ".join(str(Path(name).expanduser()) for name in paths)
    one = len(files) == 1 and is_plain_text(files[0])
    return _corpus(source, FileDocuments(tuple(files), field), one, flag)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [name for name in files if _STDLIB_LEFT_OUT.isdisjoint(name.split("/"))]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    ascii_only = tuple(files[name] for name in names if files[name].is_file() and files[name].read_bytes().isascii())
    return _corpus(f"stdlib (Python {platform.python_version()})", FileDocuments(ascii_only), False, "--data ")


def _in_folder(root: Path, flag: str) -> list[Path]:
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    names = sorted(
        name
        for name, path in files.items()
        if _is_wanted(path) and not any(part.startswith(".") for part in name.split("/")) and path.is_file()
    )
    if not names:
        raise UserError(f"{flag}{root}: no text files (.txt, .md, .py, .jsonl, .parquet, ...) in this folder")
    return [files[name] for name in names]


def _is_wanted(path: Path) -> bool:
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower() in TEXT_SUFFIXES | ROW_SUFFIXES


def _corpus(source: str, documents: FileDocuments, is_one_text: bool, flag: str) -> Corpus:
    try:
        if documents.size == 0:
            raise UserError(f"{flag}{source}: there is no text in it")
        for path in documents.files:
            path.open("rb").close()
    except OSError as error:
        raise UserError(f"{flag}{source}: cannot read {error.filename}: {error.strerror}") from error
    return Corpus(source, documents, is_one_text)
