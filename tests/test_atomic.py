"""atomic.py: a kill, an error or a full disk leaves either the complete old or the complete new content."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from filelock import Timeout

from lightning_gpt import atomic
from lightning_gpt.atomic import atomic_file, locked, remove, swap_in
from lightning_gpt.data.tokens.writing import SPLITS, TokenWriter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
# Audit events of the calls that change names on a disk.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def _killed_before(step, work, *args, events=CHANGES) -> bool:
    """Run `work` in a process that SIGKILLs itself before event number `step`; return whether it was killed."""

    def child():
        steps = itertools.count()

        def hook(event, _):
            if event in events and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work(*args)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content[:2])
        file.flush()
        file.write(content[2:])


def test_file_survives_a_kill_at_any_step(tmp_path):
    path, seen = tmp_path / "config.yaml", []
    path.write_bytes(b"old")
    for step in itertools.count():
        killed = _killed_before(step, _write, path, b"new", events=("open", *CHANGES))
        seen.append(path.read_bytes())
        assert seen[-1] in (b"old", b"new")
        assert all(
            p == path or (p.name.startswith(".config.yaml.") and p.suffix == ".part") for p in tmp_path.iterdir()
        )
        if not killed:
            break
    assert seen[0] == b"old" and seen[-1] == b"new" and len(seen) >= 3
    assert len(list(tmp_path.iterdir())) >= 2
    for part in tmp_path.glob(".*.part"):
        os.utime(part, (time.time() - 2 * 24 * 3600,) * 2)
    (fresh := tmp_path / ".config.yaml.01234567.part").touch()
    _write(path, b"newer")
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh])


def _content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()} if folder.exists() else {}


def _whole(number: int) -> dict[str, str]:
    return {name: str(number) for name in "ab"}


def _save(path: Path, number: int) -> None:
    part = path.with_name(f"{path.name}.part")
    remove(part)
    part.mkdir()
    for name, text in _whole(number).items():
        (part / name).write_text(text)
    swap_in(part, path)


def test_folder_survives_two_kills_at_any_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: None)  # slow, and a kill does not need it
    path, old, start = tmp_path / "last.ckpt", tmp_path / "last.ckpt.old", tmp_path / "start"
    between = 0
    for first in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        _save(path, 0)
        killed = _killed_before(first, _save, path, 1)
        between += not path.exists()
        for entry in tmp_path.iterdir():
            shutil.copytree(entry, start / entry.name)
        for second in itertools.count():
            killed_again = _killed_before(second, _save, path, 2)
            for folder in (path, old):
                assert _content(folder) in ({}, _whole(0), _whole(1), _whole(2)), (first, second)
            assert path.exists() or old.exists(), (first, second)
            if not killed_again:
                break
            for entry in tmp_path.iterdir():
                if entry != start:
                    shutil.rmtree(entry)
            shutil.copytree(start, tmp_path, dirs_exist_ok=True)
        assert _content(path) == _whole(2)
        shutil.rmtree(start)
        assert [p for p in tmp_path.iterdir() if p != path and p.name != "last.ckpt.old.part"] == []
        if not killed:
            break
    assert first >= 6 and between == 1
    assert list(tmp_path.iterdir()) == [path]


def _write_tokens(folder: Path, number: int) -> None:
    with TokenWriter(folder, job={"number": number}) as writer:
        if writer.finished:
            writer.discard()
            return
        if not writer.state:
            for split in SPLITS:
                writer.append(split, str(number).encode())
            writer.commit({"written": True})
        writer.publish({})


def test_token_folder_survives_a_kill_at_any_step(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: None)
    whole = [{"train.bin": str(n), "val.bin": str(n), "meta.json": "{}\n"} for n in range(2)]
    folder, between = tmp_path / "out", 0
    for step in itertools.count():
        _write_tokens(folder, 0)
        assert _content(folder) == whole[0]
        killed = _killed_before(step, _write_tokens, folder, 1, events=("open", *CHANGES))
        between += not folder.exists()
        assert _content(folder) in ({}, *whole), step
        _write_tokens(folder, 1)
        assert _content(folder) == whole[1], step
        assert list(tmp_path.iterdir()) == [folder], step
        if not killed:
            break
    assert step >= 30 and 1 <= between <= 2


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_old_file_kept_after_an_error_in_the_block(tmp_path, kind):
    path = tmp_path / "a.txt"
    for before in ([], [path]):
        with pytest.raises(kind), atomic_file(path, mode="w") as file:
            file.write("half")
            raise kind
        assert list(tmp_path.iterdir()) == before
        path.write_text("old")
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_old_file_kept_after_a_disk_error(tmp_path, monkeypatch, call):
    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(atomic.os, call, fails)
    with pytest.raises(OSError, match="No space"):
        _write(path, b"new")
    (tmp_path / "part").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    (tmp_path / "part" / "a").write_text("new")
    with pytest.raises(OSError, match="No space"):
        swap_in(tmp_path / "part", tmp_path / "folder")
    assert path.read_text() == (tmp_path / "folder" / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "folder", "part"]


def test_old_file_kept_when_the_new_one_exceeds_the_size_limit(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            _write(path, bytes(5000))
        except OSError as error:
            os._exit(error.errno)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_fsync_precedes_every_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    name_of = {}

    def noted_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("fsync", name_of.get(status.st_ino, "")))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", noted_fsync)
    monkeypatch.setattr(atomic.os, "replace", noted_replace)
    part = tmp_path / "x.part"
    (part / "sub").mkdir(parents=True)
    for path in (part / "a", part / "sub" / "b"):
        path.write_text("1")
    for path in (tmp_path, part, *part.rglob("*")):
        name_of[path.stat().st_ino] = path.name
    swap_in(part, tmp_path / "x")
    renamed = events.index(("replace", "x"))
    assert {name for kind, name in events[:renamed] if kind == "fsync"} == {"x.part", "sub", "a", "b"}
    assert events[renamed + 1] == ("fsync", tmp_path.name)
    events.clear()
    _write(tmp_path / "y", b"new")
    assert [kind for kind, _ in events] == ["fsync", "replace", "fsync"]


def test_concurrent_writers_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path, mode="w") as one, atomic_file(path, mode="w") as other:
        one.write("one" * 9999)
        other.write("other\n")
    assert path.read_bytes() == b"one" * 9999
    assert list(tmp_path.iterdir()) == [path]


def test_write_to_a_symlink_a_pipe_and_a_folder(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    _write(link, b"new")
    assert link.is_symlink() and target.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    _write(pipe, b"new")
    assert os.read(reader, 99) == b"new" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    with pytest.raises(OSError):
        _write(tmp_path, b"new")
    assert sorted(tmp_path.iterdir()) == [link, pipe, target]


@pytest.mark.parametrize(("before", "after"), [("file", "folder"), ("folder", "file"), ("file", "file")])
def test_swap_in_replaces_files_and_folders(tmp_path, before, after):
    def make(path: Path, kind: str, text: str) -> Path:
        if kind == "folder":
            path.mkdir()
            path = path / "a"
        path.write_text(text)
        return path

    make(tmp_path / "x", before, "old")
    new = make(tmp_path / "x.part", after, "new")
    swap_in(tmp_path / "x.part", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / new.relative_to(tmp_path / "x.part")).read_text() == "new"


def _hold(lock: Path, ready, workers: int) -> None:
    with locked(lock):
        for _ in range(workers):
            if os.fork() == 0:
                break
        else:
            ready.set()
        time.sleep(60)


@pytest.mark.parametrize("workers", [0, 1])
def test_lock_refuses_others_until_its_holder_is_killed(tmp_path, workers):
    lock, context = tmp_path / "lock", multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(lock, ready, workers))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(Timeout), locked(lock, wait=False):
            pytest.fail("held twice")
    finally:
        holder.kill()
        holder.join()
    with locked(lock, wait=False), pytest.raises(Timeout), locked(lock, wait=False):
        pytest.fail("held twice")


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="mine"), locked(tmp_path / "lock"):
        raise ValueError("mine")
    with locked(tmp_path / "lock", wait=False):
        pass


@pytest.mark.parametrize("wait", [True, False])
def test_block_runs_where_locks_are_unsupported(tmp_path, monkeypatch, wait):
    fcntl = pytest.importorskip("fcntl")

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    ran = []
    monkeypatch.setattr(fcntl, "flock", refuses)
    with locked(tmp_path / "lock", wait=wait):
        ran.append("no locks")
    with locked(tmp_path / "missing" / "lock", wait=wait):
        ran.append("no folder")
    assert ran == ["no locks", "no folder"]
