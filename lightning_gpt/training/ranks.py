"""Let all ranks agree on the moment at which they stop, and tell each other of failures, without their devices."""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore

NOTHING = b"-"
_runs = itertools.count()
# Seconds between two looks into the store; while a stop is being agreed on, training waits for the short one.
PERIOD, HURRY = 1.0, 0.05


class Agreement:
    """Agree on the boundary at which every rank stops.

    A boundary is a point that all ranks pass in the same order: the end of an optimizer step, or of a validation batch.
    A rank that learns of a stop reports the first boundary that it has not passed yet, also while its main thread waits
    for other ranks in a collective. All stop at the highest reported one: the rank that reported it has not begun
    anything beyond, and the others can still reach it. Until the decision is known, a rank waits at the boundary that
    it reported. Boundaries cost the main thread a lock, and nothing else, as long as nobody asks for a stop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 1
        self._reported: int | None = None
        self._decided: int | None = None

    def report(self) -> int:
        """Return the first boundary at which this rank can stop, which it will not pass before the decision."""
        with self._changed:
            if self._reported is None:
                self._reported = self._next
            return self._reported

    def decide(self, boundary: int) -> None:
        """Set the boundary at which all ranks stop: the highest reported one."""
        with self._changed:
            self._decided = boundary
            self._changed.notify_all()

    def passes(self) -> bool:
        """Pass a boundary, on the main thread; return whether the run stops here."""
        with self._changed:
            here = self._next
            while self._reported is not None and here >= self._reported and self._decided is None:
                self._changed.wait(0.1)  # in short pieces, after each of which Python runs its signal handlers
            if self._decided is not None and here >= self._decided:
                return True
            self._next += 1
            return False


class Ranks:
    """Exchange news between ranks over the store of torch.distributed, in a thread of its own.

    Everything is asked of the store by this thread alone, because a call blocks while the store's process is stopped.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        agreement: This rank's view of the stop.
        status: Returns what this rank's main thread does, for the messages of other ranks; raises ConnectionError if
            the store cannot be there any more.
        stopping: Called with the reason, once, when any rank has asked for a stop.
        failed: Called when another rank has failed: with a text, or None if the store has become unreachable; and with
            whether this rank is the one to say so.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        agreement: Agreement,
        status: Callable[[], str],
        stopping: Callable[[str], None],
        failed: Callable[[str | None, bool], None],
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._agreement, self._status, self._stopping, self._failed = agreement, status, stopping, failed
        # The store outlives torchrun's restarts, and several runs of one process.
        run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=300))
        self._store = PrefixStore(f"lightning_gpt/{run}", client)
        for key in ("stop", "boundary", "failed"):
            self._store.compare_set(key, "", NOTHING.decode())
        # Ranks on one machine see each other's processes.
        self._home = f"{socket.gethostname()} {_boot_id()}"
        self._store.set(f"process/{rank}", f"{os.getpid()} {self._home}")
        self._neighbours: dict[int, int] | None = None
        self._wake, self._posted = threading.Event(), threading.Event()
        self._request: str | None = None
        self._failure: str | None = None
        self._closing = self._left = False
        self._stop_known = False
        self._beats: dict[int, tuple[bytes, float]] = {}
        self.answered = time.monotonic()
        self.survey = False  # whether to look at what the other ranks do
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def ask(self, reason: str) -> None:
        """Ask all ranks to stop; the first reason counts."""
        self._request = self._request or reason
        self._wake.set()

    def fail(self, text: str, *, patience: float) -> None:
        """Tell all ranks that this one has failed, and wait up to ``patience`` seconds until they can know."""
        self._failure = self._failure or text
        self._wake.set()
        self._posted.wait(patience)

    def close(self, *, patience: float) -> None:
        """Leave, at the end of a run, after all ranks have come here, or after ``patience`` seconds."""
        self._closing = True
        self._wake.set()
        self._thread.join(patience)

    def abandon(self) -> None:
        """Leave without the others; Python aborts at its end if a thread is then inside the store's code."""
        self._left = True
        self._wake.set()
        self._thread.join(2.0)

    def others(self) -> dict[int, tuple[str, float]]:
        """Return what each other rank said last, and how many seconds ago; empty before the first survey."""
        now = time.monotonic()
        return {rank: (beat.decode().partition(" ")[2], now - since) for rank, (beat, since) in self._beats.items()}

    def _run(self) -> None:
        count = 0
        while not self._left:
            count += 1
            try:
                if self._exchange(count):
                    return
            except Exception:  # torch raises several kinds when the process that holds the store is gone
                if not self._closing and not self._left:
                    self._failed(None, False)
                return
            self.answered = time.monotonic()
            agreeing = self._closing or (self._stop_known and self._agreement._decided is None)
            self._wake.wait(HURRY if agreeing else PERIOD)
            self._wake.clear()

    def _exchange(self, count: int) -> bool:
        """Tell and ask the store; return whether all ranks have come to the end."""
        store, every = self._store, range(self.world_size)
        store.set(f"beat/{self.rank}", f"{count} {self._status()}")
        if self._request:
            store.compare_set("stop", NOTHING.decode(), self._request)
        if self._failure and not self._posted.is_set():
            store.compare_set("failed", NOTHING.decode(), f"{self.rank} {self._failure}")
            self._posted.set()
        if self._closing:
            store.set(f"done/{self.rank}", "")
            # Rank 0 may hold the store, so it leaves last.
            return self.rank > 0 or store.check([f"done/{rank}" for rank in every])
        stop, boundary, failed = store.multi_get(["stop", "boundary", "failed"])
        if failed != NOTHING and not failed.startswith(f"{self.rank} ".encode()):
            self._failed(failed.decode().partition(" ")[2], False)
        if stop != NOTHING:
            if not self._stop_known:
                self._stop_known = True
                self._stopping(stop.decode())
                store.set(f"report/{self.rank}", str(self._agreement.report()))
            reports = [f"report/{rank}" for rank in every]
            if self.rank == 0 and boundary == NOTHING and store.check(reports):
                boundary = str(max(map(int, store.multi_get(reports)))).encode()
                store.set("boundary", boundary.decode())
            if boundary != NOTHING:
                self._agreement.decide(int(boundary))
        if self.survey:
            self._look_around()
        return False

    def _look_around(self) -> None:
        """Read what the other ranks do, and whether those on this machine exist."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        keys = [f"beat/{rank}" for rank in others]
        if not self._store.check(keys):
            return
        now = time.monotonic()
        for rank, beat in zip(others, self._store.multi_get(keys), strict=True):
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, now)
        if self._neighbours is None:
            places = self._store.multi_get([f"process/{rank}" for rank in others])
            parts = {rank: place.decode().partition(" ") for rank, place in zip(others, places, strict=True)}
            self._neighbours = {rank: int(pid) for rank, (pid, _, home) in parts.items() if home == self._home}
        for rank, pid in self._neighbours.items():
            if not _exists(pid):
                text = f"rank {rank} is gone (killed?)"
                first = self._store.compare_set("failed", NOTHING.decode(), f"{self.rank} {text}")
                self._failed(text, first.startswith(f"{self.rank} ".encode()))


def _boot_id() -> str:
    """Return what tells containers and machines of one name apart; empty where it is unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # unknown: on Windows, signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main_thread_function() -> str:
    """Return the name of the Python function that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame.f_code.co_name if frame else "?"
