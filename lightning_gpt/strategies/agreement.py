"""Let all ranks decide alike, and learn that one of them could not write, so that none waits for another."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import torch


def holds_for_all(mine: bool) -> bool:
    """Return whether a condition holds on every rank; called on all ranks."""
    return all(_gathered(mine))


def _gathered(mine: Any) -> list[Any]:
    """Return every rank's object."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Run the block on every rank, wait for all of them, and raise the first OSError of any rank on all.

    Inside the block, a rank that fails must not leave others waiting for it: collective operations come before the
    first write, or fail on all ranks.

    Raises:
        OSError: A rank could not write; with the error number, message and path of the first one that failed.
    """
    problem: OSError | None = None
    try:
        yield
    except BaseException as error:
        problem = _writing_error(error)
        if problem is None:
            raise
    # The context of an exception is lost when it is pickled, so only its three fields are sent.
    mine = None if problem is None else (problem.errno, problem.strerror or str(problem), problem.filename)
    theirs = next((fields for fields in _gathered(mine) if fields is not None), None)
    if theirs is not None:
        problem = OSError(*theirs)
    if problem is not None:
        raise problem


def _writing_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind an exception of torch's writers; None for an exception of another kind."""
    from torch.distributed.checkpoint.api import CheckpointException

    is_writers = False
    while error is not None:
        if isinstance(error, OSError):
            return error
        if isinstance(error, CheckpointException):
            return next(filter(None, (_writing_error(failure) for failure, _ in error.failures.values())), None)
        # torch's writers in C++ do not pass on the system's error number.
        is_writers |= isinstance(error, RuntimeError) and any(
            text in str(error) for text in ("inline_container", "PytorchStreamWriter", "iostream error", "write(): fd")
        )
        error = error.__cause__ or error.__context__
    return OSError(errno.EIO, "a write failed; the disk may be full, or a quota reached") if is_writers else None
