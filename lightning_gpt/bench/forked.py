"""Training runs in forked processes, which start in a fraction of a second and can be killed.

The forking process imports torch and Lightning, but computes nothing: a process that has started torch's threads cannot
be forked safely.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from mmap import mmap
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_gpt.cli import parse_train, reporting_errors
from lightning_gpt.training.run import train

_SLOT = 16  # bytes per rank in the file of beats: the step, and whether a save is in progress
_POLL_SECONDS = 2e-4


class Heartbeat(Callback):
    """Write the step, and whether a checkpoint is being saved, into memory that the parent process reads.

    Args:
        shared: Shared memory of 16 bytes per rank.
    """

    def __init__(self, shared: mmap) -> None:
        self.shared = shared

    def _write(self, trainer: Trainer, *, saving: bool) -> None:
        content = trainer.global_step.to_bytes(8, "little") + int(saving).to_bytes(8, "little")
        start = trainer.global_rank * _SLOT
        self.shared[start : start + _SLOT] = content

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Report the step before each batch, when no save is in progress."""
        self._write(trainer, saving=False)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Report the last step."""
        self._write(trainer, saving=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report that a save has begun."""
        self._write(trainer, saving=True)


class ForkedRun:
    """The processes of one training run, one per rank.

    Args:
        flags: Command line of train.py.
        ranks: Number of processes.
        output: File to which stdout and stderr of all ranks are appended.
        make_callback: Makes a further callback, in each child process before it builds anything.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        ranks: int,
        output: Path,
        make_callback: Callable[[], Callback] | None = None,
    ) -> None:
        self._make_callback = make_callback
        self._shared = mmap(-1, ranks * _SLOT)
        launch = _launch_variables(ranks)
        context = get_context("fork")
        self.processes = [
            context.Process(target=self._train, args=(list(flags), launch, rank, output), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def _train(self, flags: list[str], launch: dict[str, str], rank: int, output: Path) -> None:
        """Be one rank; in the child process."""
        if launch:
            os.environ.update(launch, RANK=str(rank), LOCAL_RANK=str(rank))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        _redirect(output)
        callbacks: list[Callback] = [Heartbeat(self._shared)]
        if self._make_callback is not None:
            callbacks.append(self._make_callback())

        @reporting_errors
        def main(argv: Sequence[str] | None = None) -> None:
            train(parse_train(argv), callbacks=callbacks)

        main(flags)

    @property
    def step(self) -> int:
        """Last step that rank 0 reported."""
        return int.from_bytes(self._shared[0:8], "little")

    @property
    def saving(self) -> bool:
        """Whether rank 0 is saving a checkpoint."""
        return self._shared[8] == 1

    @property
    def alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], *, timeout: float = 600) -> bool:
        """Wait until a condition holds; return False if a process ended or the time is over."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.alive or time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def wait(self, *, timeout: float, grace: float = 10) -> bool:
        """Wait for the end without using the processor; return False if the time was over. Kills what is left.

        Args:
            timeout: Limit in seconds.
            grace: Seconds that the other ranks have after the first one ends.
        """
        ended = bool(wait([process.sentinel for process in self.processes], timeout))
        if ended and any(process.exitcode for process in self.processes):
            grace = 0  # the others wait for the one that failed
        self.join(timeout=grace if ended else 0)
        return ended

    def send(self, number: int, *, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill all processes, as a machine that loses power does."""
        self.send(signal.SIGKILL)
        self.join()

    def join(self, *, timeout: float = 600) -> list[int | None]:
        """Wait for the end, kill what is left after `timeout` seconds, and return the exit codes."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def in_child(function: Callable[..., Any], *args: Any, timeout: float = 600) -> Any:
    """Call a function in a forked process, so that the parent stays able to fork, and return its result.

    Raises:
        RuntimeError: The process ended without a result, or took longer than `timeout` seconds.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(function(*args))

    process = context.Process(target=work, daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            with contextlib.suppress(EOFError):
                return receiver.recv()
    finally:
        process.kill()
        process.join()
    raise RuntimeError(
        f"{getattr(function, '__name__', function)} gave no result; its process exited with {process.exitcode}"
    )


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes by which resident memory has grown at its peak, on Linux."""
    reset_peak()
    before = _status_bytes("VmRSS")
    yield lambda: max(0, _status_bytes("VmHWM") - before)


def reset_peak() -> None:
    """Let the peak of this process's resident memory start again from now, on Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Return the resident memory of this process, without the pages of mapped files, on Linux."""
    return _status_bytes("RssAnon")


def peak_resident_bytes() -> int:
    """Return the peak of ``resident_bytes``, if the mapped files have not changed since, on Linux."""
    return _status_bytes("VmHWM") - _status_bytes("RssFile")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _launch_variables(ranks: int) -> dict[str, str]:
    """Return the variables that torchrun sets, the same for all ranks; none for a single process."""
    if ranks == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "bench",
    }


def _redirect(output: Path) -> None:
    """Append what this process prints, and what libraries print, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
