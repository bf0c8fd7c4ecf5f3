"""Named data sets: where to get them, and their usual tokenizer and split."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from lightning_gpt.atomic import atomic_file
from lightning_gpt.config import UserError, cache_root
from lightning_gpt.data.text.corpora import Corpus, find_corpus
from lightning_gpt.data.text.documents import Block, FileDocuments, require

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_ROWS = 8_013_769
_ADVICE = (
    f"put its files (https://huggingface.co/datasets/{OPENWEBTEXT}) into a folder, as .parquet, .jsonl or .txt, "
    "optionally .gz or .zst, and give it by --from FOLDER"
)
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class NamedSet:
    """A named data set.

    Attributes:
        tokenizer: Default of ``--tokenizer``.
        val_fraction: Default of ``--val_fraction``.
        find: Function from the values of ``--from`` and ``--field`` to the corpus.
    """

    tokenizer: str
    val_fraction: float
    find: Callable[[str | None, str], Corpus]


def _tiny_shakespeare(from_file: str | None, field: str) -> Corpus:
    path = Path(from_file).expanduser() if from_file else cache_root() / "downloads" / "tinyshakespeare.txt"
    try:
        if from_file is None and not path.is_file():
            _download(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not the text of tiny Shakespeare (its SHA-256 differs); to prepare another text, "
            "give its path instead of the name"
        )
    return Corpus(f"tiny Shakespeare ({SHAKESPEARE_URL})", FileDocuments((path,)), is_one_text=True)


def _download(path: Path) -> None:
    try:
        with urlopen(SHAKESPEARE_URL, timeout=_TIMEOUT_SECONDS) as response:
            content = response.read()
    except (URLError, OSError) as error:
        raise UserError(
            f"tiny Shakespeare cannot be fetched ({error}); save {SHAKESPEARE_URL} as {path}, or as any file and give "
            "it by --from FILE"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)


@dataclass(frozen=True)
class HubDocuments:
    """The rows of a data set on the Hugging Face hub, streamed.

    Attributes:
        name: Name of the data set.
        n_rows: Expected number of rows; with fewer, the stream is incomplete.
        field: The column that holds the text.
    """

    name: str
    n_rows: int
    field: str = "text"

    @property
    def size(self) -> int | None:
        """Return None: a stream's size is unknown."""
        return None

    def identity(self) -> list[Any]:
        """Return the name and the column."""
        return [self.name, self.field]

    def blocks(self, first: int = 0, offset: int = 0) -> Iterator[Block]:
        """Yield blocks from byte `offset` of row `first` on; `disk` counts from there.

        Raises:
            UserError: The hub returned too few rows, or rows without text.
            OSError: The connection was lost.
        """
        read, number = 0, first - 1
        for number, row in enumerate(self._rows(first), first):
            text = row.get(self.field)
            if not isinstance(text, str):
                raise UserError(f"{self.name} has no text column {self.field!r} (columns: {', '.join(row)})")
            data = text.encode("utf-8", "replace")
            start, read = offset if number == first else 0, read + len(data)
            yield Block(data[start:], True, f"{self.name}, row {number + 1}", start, read)
        if number + 1 != self.n_rows:
            raise UserError(f"{self.name} returned {number + 1:,} rows instead of {self.n_rows:,}; {_ADVICE}")

    def _rows(self, first: int) -> Iterator[dict[str, Any]]:
        load = require("datasets", self.name).load_dataset
        try:
            try:
                rows = load(self.name, split="train", streaming=True)
            except (RuntimeError, ValueError):  # the data set has a loading script, which datasets does not run
                rows = load(self.name, revision="refs/convert/parquet", split="train", streaming=True)
            yield from rows.skip(first) if first else rows
        except Exception as error:  # each HTTP client raises its own kind
            raise ConnectionError(f"{self.name} cannot be read further ({error})") from error


def _openwebtext(from_file: str | None, field: str) -> Corpus:
    if from_file:
        return find_corpus([from_file], field=field, flag="--from ")
    require("datasets", "openwebtext: reading the Hugging Face hub")
    try:  # fail early: datasets itself retries for minutes
        socket.create_connection(("huggingface.co", 443), timeout=_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise UserError(f"huggingface.co cannot be reached ({error}); {_ADVICE}") from error
    return Corpus(OPENWEBTEXT, HubDocuments(OPENWEBTEXT, OPENWEBTEXT_ROWS, field))


NAMED_SETS: dict[str, NamedSet] = {
    "shakespeare_char": NamedSet("char", 0.1, _tiny_shakespeare),
    "shakespeare": NamedSet("gpt2", 0.1, _tiny_shakespeare),
    "openwebtext": NamedSet("gpt2", 0.0005, _openwebtext),
}
