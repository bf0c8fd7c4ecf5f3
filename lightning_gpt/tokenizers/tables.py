"""Find, check and cache tiktoken's tables.

tiktoken's own reader silently deletes a cached file with a wrong hash, even one that the user put there, and waits for
the network without a time limit. This module replaces that reader while an encoding is built; it never deletes a file,
and names the wrong one. URLs and hashes come from tiktoken and its plugins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_gpt.atomic import atomic_file
from lightning_gpt.config import UserError, cache_root
from lightning_gpt.invocation import install_line

_LOCK = threading.RLock()
_TIMEOUT = (5, 60)  # seconds to connect, and to wait for the next bytes


def encoding_names() -> list[str]:
    """Return the encodings of tiktoken and its plugins; empty if it is not installed."""
    try:
        import tiktoken
    except ImportError:
        return []
    return tiktoken.list_encoding_names()


@functools.cache
def load_encoding(name: str) -> Any:
    """Return a ``tiktoken.Encoding`` by its name.

    Looks for its tables in TIKTOKEN_CACHE_DIR, in our cache folder (see `keep_tables`) and in tiktoken's default
    folder, and downloads missing ones to our cache folder.

    Raises:
        UserError: tiktoken is not installed, a file has a wrong hash, or a table cannot be found or downloaded.
    """
    named = (os.environ.get(variable) for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    folders = [Path(folder) for folder in named if folder]
    folders += [_own_folder(), Path(tempfile.gettempdir(), "data-gym-cache")]
    failures: list[Exception] = []

    def read(url: str, expected: str | None) -> bytes | None:
        for folder in folders:
            if file := _in_folder(folder, url):
                return _verified(file, url, expected, encoding=name)
        if failures:  # wait for the network only once
            return None
        try:
            content = _download(url, expected)
        except (OSError, ImportError) as error:  # requests' errors are OSErrors
            failures.append(error)
            return None
        with contextlib.suppress(OSError):
            _store(url, content)
        return content

    fields, missing = _construct(name, read)
    if missing:
        raise UserError(
            f"the tables of {name} are not on this machine and cannot be fetched ({type(failures[0]).__name__}); put "
            f"{' and '.join(missing)} into a folder and name it in TIKTOKEN_CACHE_DIR or by train.py --tokenizer_file, "
            "or use --tokenizer char"
        )
    import tiktoken

    return tiktoken.Encoding(**fields)


def keep_tables(name: str, path: str) -> None:
    """Check the tables of an encoding and copy them to our cache folder, where `load_encoding` finds them.

    Args:
        name: Name of the encoding.
        path: The file, or a folder of files under their original names (``vocab.bpe`` and ``encoder.json`` for
            gpt2, else for example ``r50k_base.tiktoken``) or their names in tiktoken's cache.

    Raises:
        UserError: A file is missing or has a wrong hash; nothing was copied.
    """
    given = Path(path).expanduser()
    if not os.path.exists(given):
        raise UserError(f"--tokenizer_file {path}: no such file or folder")
    found: dict[str, bytes] = {}

    def read(url: str, expected: str | None) -> bytes | None:
        file = _in_folder(given, url) if given.is_dir() else given
        if file:
            found[url] = _verified(file, url, expected, encoding=name)
        return found.get(url)

    _, missing = _construct(name, read)
    if missing:
        files = " and no ".join(_file_name(url) for url in missing)
        raise UserError(f"--tokenizer_file {path} has no {files}, which {name} needs; see {missing[0]}")
    try:
        for url, content in found.items():
            _store(url, content)
    except OSError as error:
        raise UserError(
            f"the cache folder {_own_folder()} cannot be written ({error.strerror}); "
            "set LIGHTNING_GPT_CACHE to a folder that can"
        ) from error


def _construct(name: str, read: Callable[[str, str | None], bytes | None]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of ``tiktoken.Encoding`` with the tables from `read`, and the URLs of missing tables."""
    try:
        import tiktoken.load
        import tiktoken.registry
    except ImportError:
        raise UserError(f"--tokenizer {name} needs the package tiktoken: {install_line('nanogpt')}") from None
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"this tiktoken ({tiktoken.__version__}) has no encoding {name}; install a newer one")
    missing: list[str] = []

    def reader(blobpath: str, expected_hash: str | None = None) -> bytes:
        content = read(blobpath, expected_hash)
        if content is None:
            missing.append(blobpath)
        return content or b""

    with _LOCK:
        tiktoken_reader = tiktoken.load.read_file_cached
        tiktoken.load.read_file_cached = reader
        try:
            constructors = tiktoken.registry.ENCODING_CONSTRUCTORS
            assert constructors is not None  # list_encoding_names has filled it
            return constructors[name](), missing
        except (ValueError, AssertionError, LookupError):
            if not missing:
                raise
            return {}, missing  # a missing table is read as empty, which tiktoken may reject
        finally:
            tiktoken.load.read_file_cached = tiktoken_reader


def _own_folder() -> Path:
    return cache_root() / "tiktoken"


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()  # as tiktoken names it


def _in_folder(folder: Path, url: str) -> Path | None:
    return next((f for f in (folder / _cache_name(url), folder / _file_name(url)) if f.is_file()), None)


def _verified(file: Path, url: str, expected: str | None, *, encoding: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}, a table of {encoding}, cannot be read: {error.strerror}") from error
    actual = hashlib.sha256(content).hexdigest()
    if expected is not None and expected != actual:
        raise UserError(
            f"{file} is not {encoding}'s {_file_name(url)}: its sha256 begins with {actual[:12]}, not {expected[:12]}; "
            f"replace it by {url}"
        )
    return content


def _download(url: str, expected: str | None) -> bytes:
    import requests

    response = requests.get(url, timeout=_TIMEOUT)
    response.raise_for_status()
    actual = hashlib.sha256(response.content).hexdigest()
    if expected is not None and expected != actual:
        raise UserError(f"{url} returned a file whose sha256 begins with {actual[:12]}, not {expected[:12]}; try again")
    return response.content


def _store(url: str, content: bytes) -> None:
    folder = _own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _cache_name(url)) as file:
        file.write(content)
