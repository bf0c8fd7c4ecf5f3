"""Watch a run from a thread of its own: signals, ranks that die, and steps that do not end.

Python runs signal handlers on the main thread only, which may be blocked inside a collective or a compiler. The C part
of Python's handler writes the signal's number into a socket at once, and this thread reads it there.
"""

import contextlib
import errno
import io
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Trainer

from lightning_gpt.invocation import command_line
from lightning_gpt.training.ranks import Agreement, Ranks, main_thread_function

MAX_TIME = "max_time"
# Exit code for each reason to stop: 128 + the signal, as shells have it; 75 is EX_TEMPFAIL, "try again later".
REQUEUE = 75
EXIT_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143, "SIGUSR1": REQUEUE, "SIGUSR2": REQUEUE, MAX_TIME: 0}
# Windows lacks some of them.
SIGNALS = {int(getattr(signal, name)): name for name in EXIT_CODES if hasattr(signal, name)}

# Seconds. A stop ends the process when no step has ended for GRACE plus twice the last step's duration, or for
# SAVING_GRACE while a checkpoint is written. torchrun kills its processes 30 s after SIGTERM.
GRACE, SAVING_GRACE = 20.0, 600.0
# A run that gets no further says so after this time, plus ten times the last step's; the first step may compile.
STALLED, FIRST_STALLED = 60.0, 300.0
# A rank that has not answered for this long counts as stopped, or, once another has noticed a failure, as dead.
SILENT = 5.0
# The time that the main thread is given to end by itself.
LEAVING = 5.0

_PARENT = "LIGHTNING_GPT_PARENT"  # process id of the rank that launches the others
_active: "Watchdog | None" = None


class Watchdog:
    """Notice what a run's main thread cannot, and end the process when the main thread does not.

    Attributes:
        agreement: When all ranks stop.
        reason: Why the run stops, a key of EXIT_CODES; None while it goes on.
        training: Whether a stop waits for the end of the step; otherwise the process ends at once.
        loss: What is known of a rank that died; None while all live.
    """

    def __init__(self, *, max_seconds: float | None = None) -> None:
        self.agreement = Agreement()
        self.reason: str | None = None
        self.training = self.finished = False
        self.failing = self.leaving = self.closing = False
        self.loss: str | None = None
        self.ranks: Ranks | None = None
        self.run_dir: Path | None = None
        self.trainer: Trainer | None = None
        self._deadline = time.monotonic() + max_seconds if max_seconds else None
        self._interrupted = False
        self._asked: str | None = None
        self._asked_at = 0.0
        self._exit_at, self._exit_code = float("inf"), 1
        self._doing, self._touched = "set-up", time.monotonic()
        self._last_duration: float | None = None
        self._said_stalled = 0.0
        self._dead_since: dict[int, float] = {}
        self._stop_thread = False
        self._restore: list[Callable[[], object]] = []
        self._parent = _parent()
        self.is_launched = _PARENT in os.environ and "LOCAL_RANK" in os.environ

    def __enter__(self) -> "Watchdog":
        global _active
        if not self.is_launched:
            os.environ[_PARENT] = str(os.getpid())
            self._restore.append(lambda: os.environ.pop(_PARENT, None))
        self._socket, self._written = socket.socketpair()
        self._written.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            _active = self
            previous = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
            self._restore.append(lambda: signal.set_wakeup_fd(previous))
            self._restore += map(_outlive_terminal, ("stdout", "stderr"))
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:  # nohup and shells' background jobs ignore some
                    signal.signal(number, self._handle)
                    self._restore.append(partial(signal.signal, number, handler))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._stop_thread = True
        with contextlib.suppress(OSError):
            self._written.send(b"\0")
        self._thread.join()
        for restore in reversed(self._restore):
            restore()
        _active = None
        self._socket.close()
        self._written.close()

    @property
    def rank(self) -> int:
        """This process's rank; before the ranks have met, that within its launcher."""
        return self.ranks.rank if self.ranks else int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)

    def touch(self, doing: str, *, ends_step: bool = False) -> None:
        """Record what the main thread begins to do."""
        now = time.monotonic()
        if ends_step:
            self._last_duration = now - self._touched
        self._doing, self._touched = doing, now

    def status(self) -> str:
        """Return what the main thread does, such as "step 13 (all_reduce)"."""
        return f"{self._doing} ({main_thread_function()})"

    def heartbeat(self) -> str:
        """Return the status; raise ConnectionError for an orphan, before torch prints a trace of its C++ functions."""
        if self._is_orphan():
            raise ConnectionError
        return self.status()

    def ask(self, reason: str) -> None:
        """Ask all ranks to stop at the end of the step."""
        if self._asked is None:
            self._asked, self._asked_at = reason, time.monotonic()
        if self.ranks:
            self.ranks.ask(reason)
        else:
            self.agreement.decide(self.agreement.report())
            self.learn(reason)

    def learn(self, reason: str) -> None:
        """Take note that some rank has asked for a stop."""
        if self.reason:
            return
        self.reason = reason
        if self._asked is None:
            self._asked, self._asked_at = reason, time.monotonic()
        if self.finished and not self.leaving:
            self.end(EXIT_CODES[reason])
        if self.rank == 0 and reason != MAX_TIME:
            _say(f"\n{reason}: stopping at the end of this step; Ctrl-C stops at once")

    def lose(self, text: str | None, *, speaks: bool = True) -> None:
        """Take note that a rank has died or failed, say so, and end this process soon.

        Args:
            text: What happened; None if the process that holds the store is gone.
            speaks: Whether no other rank says it.
        """
        if self.loss is not None or self.closing:
            return
        if text is None:
            torchrun = "TORCHELASTIC_RUN_ID" in os.environ
            text, speaks = ("torchrun is gone", self.rank == 0) if torchrun else ("rank 0 is gone", self.rank == 1)
        self.loss = text
        if speaks:
            _say(f"\nerror: {text}; the run ends; {self.how_to_continue()}")
        self._leave(1, after=LEAVING if self.failing else 1.0)  # 1 s in which the other ranks learn of it

    def how_to_continue(self) -> str:
        """Return the command that continues the run, or that nothing is saved."""
        if self.run_dir is None or not any((self.run_dir / "checkpoints").glob("*.ckpt")):
            return "it had saved nothing yet"
        return f"to continue: {command_line('train', f'--resume {self.run_dir}')}"

    def end(self, code: int) -> None:
        """End this process and the ranks that it has launched, now."""
        for child in self.children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    def children(self) -> list[subprocess.Popen]:
        """Return the ranks that this process has launched."""
        return getattr(self.trainer and self.trainer.strategy.launcher, "procs", [])

    def _leave(self, code: int, *, after: float = LEAVING) -> None:
        """End the process if the main thread has not done so ``after`` seconds from now."""
        if self._exit_at == float("inf"):
            self._exit_at, self._exit_code = time.monotonic() + after, code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """End at once, on the main thread, outside of training; in training the thread sees to it."""
        if self.training or self.leaving or self.closing:
            return
        self.leaving = True
        self._say_ending()
        raise SystemExit(EXIT_CODES[SIGNALS[number]])

    def _say_ending(self) -> None:
        if self.rank == 0:
            when = "after the last step; the run is complete" if self.finished else "before the first step"
            _say(f"\nstopped {when}")

    def _signalled(self, name: str) -> None:
        if name == "SIGHUP":
            _let_go_of_terminal()
        if name == "SIGINT":
            if self._interrupted:
                self.end(EXIT_CODES[name])
            self._interrupted = True
        if self.training:
            self.ask(name)
        if self.training or self.closing or self.loss is not None:
            return
        self._leave(EXIT_CODES[name])
        if self.finished and self.ranks:
            self.ranks.ask(name)

    def _run(self) -> None:
        while not self._stop_thread:
            if select.select([self._socket], [], [], 0.25)[0]:
                for number in self._socket.recv(64):
                    if number in SIGNALS:
                        self._signalled(SIGNALS[number])
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        if now > self._exit_at:
            if self.loss is None and not self.leaving:  # the main thread never came to its handler
                self._say_ending()
            self.end(self._exit_code)
        if self._is_orphan():
            self.lose(None)
        if self.training and self._deadline and now > self._deadline and not self.reason and self.rank == 0:
            self.ask(MAX_TIME)
        if not self.closing:
            self._look_at_children(now)
            self._look_at_steps(now)

    def _is_orphan(self) -> bool:
        return self._parent is not None and os.getppid() != self._parent

    def _look_at_children(self, now: float) -> None:
        for i, child in enumerate(self.children()):
            code = child.poll()
            if code is None or self.loss is not None:
                continue
            # A rank that fails by itself has told why, or will be refused here as well.
            since = self._dead_since.setdefault(i, now)
            if code < 0 or now - since > LEAVING:
                how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
                text = f"rank {self.rank + i + 1} {how}"
                self.lose(text)
                if self.ranks:
                    self.ranks.fail(text, patience=1.0)

    def _look_at_steps(self, now: float) -> None:
        idle, last, reason = now - self._touched, self._last_duration, self.reason or self._asked
        if self.ranks:
            self.ranks.survey = self.failing or idle > SILENT + 2 * (last or 0.0)
            if self.failing and self.loss is None:
                silent = self._silent()
                if silent:
                    speaks = min(set(range(self.ranks.world_size)) - set(silent)) == self.ranks.rank
                    self.lose(f"{_named(silent)} did not answer (killed, or its machine is down)", speaks=speaks)
        if not self.training or self.failing:
            return
        saving = self._doing == "saving"
        grace = SAVING_GRACE if saving else GRACE + 2 * (last or 0.0)
        if reason and now - max(self._asked_at, self._touched) > grace:
            self._say_stalled(f"{reason}, but no step has ended for {idle:.0f} s")
            self.end(EXIT_CODES[reason])
        limit = FIRST_STALLED if last is None else STALLED + 10 * last
        if idle > limit and self._touched > self._said_stalled:
            self._said_stalled = now
            self._say_stalled(f"no progress for {idle:.0f} s")

    def _say_stalled(self, what: str) -> None:
        """Say which rank waits where, on the lowest rank that can."""
        ranks, others = self.ranks, []
        silent = self._silent()
        if ranks and any(rank not in silent for rank in range(ranks.rank)):
            return
        if ranks:
            others = [f"rank {rank} is in {said}" for rank, (said, _) in ranks.others().items() if rank not in silent]
            others = others[:8] + ([f"{_named(silent)} did not answer"] if silent else [])
        place = f"rank {self.rank} is in {self.status()}"
        _say(f"\n{'; '.join([f'{what}: {place}', *others])}; {self.how_to_continue()}")

    def _silent(self) -> list[int]:
        """Return the ranks that do not answer; only rank 0 if the store, which it holds, does not."""
        if self.ranks is None:
            return []
        if time.monotonic() - self.ranks.answered > SILENT:
            return [0]
        return [rank for rank, (_, age) in self.ranks.others().items() if age > SILENT]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"


def _parent() -> int | None:
    """Return the process without which this one must not go on: torchrun, or the rank that launched it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.getppid()
    return int(os.environ[_PARENT]) if _PARENT in os.environ and "LOCAL_RANK" in os.environ else None


class _Terminal(io.FileIO):
    """A terminal whose end is survived: a write can fail before SIGHUP is handled, or SIGHUP may be ignored."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _let_go_of_terminal()
            return len(data)


def _outlive_terminal(name: str) -> Callable[[], object]:
    """Let a stream of ``sys`` survive its terminal, if it is one; return what restores the stream."""
    stream = getattr(sys, name)
    try:
        descriptor = stream.fileno() if stream.isatty() else None
    except (AttributeError, OSError, ValueError):  # no stream, or one that is closed or not a file
        descriptor = None
    if descriptor is None:
        return lambda: None
    stream.flush()
    terminal = io.BufferedWriter(_Terminal(descriptor, "w", closefd=False))
    lasting = io.TextIOWrapper(terminal, stream.encoding, stream.errors, line_buffering=True)
    setattr(sys, name, lasting)

    def restore() -> None:
        lasting.flush()
        setattr(sys, name, stream)

    return restore


def _let_go_of_terminal() -> None:
    """Let output to the terminal, which is closed, go nowhere instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _after_fork() -> None:
    """Undo the handlers in forked processes, such as data workers, whose signals would count as this process's."""
    global _active
    if _active:
        for restore in reversed(_active._restore):
            restore()
        _active = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
