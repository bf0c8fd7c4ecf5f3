"""Map token files into memory, and notice when one is truncated."""

from pathlib import Path
from typing import Any

import numpy as np

from lightning_gpt.config import UserError


class TruncatedFile(UserError):
    """A token file became shorter while it was read.

    Args:
        message: What happened; or the traceback that ends with it, as the message of a loader worker's exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class TokenFile:
    """Map the same file into memory at every call: the one that was at `path` first, even if it was replaced since.

    Picklable; another process opens the file that it finds at `path`.

    Args:
        path: The file.
        dtype: Type of the tokens.
        n_tokens: Number of tokens to map.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, dtype: np.dtype, n_tokens: int) -> None:
        self.path = path
        self.dtype = dtype
        self.n_tokens = n_tokens
        self._file = path.open("rb", buffering=0)

    def __call__(self) -> np.memmap:
        """Return the tokens, shape (n_tokens,), read-only.

        Raises:
            TruncatedFile: The file has become too short.
        """
        try:
            return np.memmap(self._file, dtype=self.dtype, mode="r", shape=(self.n_tokens,))
        except ValueError as error:  # the map would be longer than the file
            raise TruncatedFile(_truncated(self.path)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "dtype": self.dtype, "n_tokens": self.n_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def require_whole(tokens: np.ndarray) -> None:
    """Check that the file behind a memory map still has all of the mapped bytes, before they are read.

    Reading beyond the end of a file kills the process (SIGBUS). The check is one fstat call. A file that is truncated
    between the check and the end of the read, which is microseconds if the pages are in memory, still kills it; so does
    a disk error under a mapped page.

    Args:
        tokens: A memory map; other arrays pass.

    Raises:
        TruncatedFile: The file has become too short.
    """
    # A map keeps a descriptor of its own file, whatever is at the path now.
    if isinstance(tokens, np.memmap) and tokens._mmap.size() < tokens.nbytes:  # type: ignore[attr-defined]
        raise TruncatedFile(_truncated(tokens.filename))


def _truncated(path: object) -> str:
    return f"{path} was truncated while it was read; write it again with prepare.py, then --resume the run"
