"""strategies/saving.py: checkpoints survive kills, power cuts and copies by hard links."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.checksums import verify_checksums
from lightning_gpt.strategies import saving
from lightning_gpt.strategies.fsdp import FSDP
from lightning_gpt.strategies.saving import WholeFiles, copy_checkpoint

REPO = Path(__file__).parents[2]
# The calls that change what a disk holds.
CHANGES = ("fsync", "link", "mkdir", "remove", "rename", "replace", "rmdir", "unlink")


class Death(BaseException):
    """The end of a process, after which it changes nothing more."""


def _dies_at(number: int, work, *args, changes=CHANGES) -> bool:
    """Call `work` in a process that seems to die before its change `number` of the disk; return whether it did."""
    count = itertools.count()

    def dying(call):
        def replaced(*args, **kwargs):
            if next(count) >= number:
                raise Death
            return call(*args, **kwargs)

        return replaced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: None)  # slow, and a death does not need it
        for name in changes:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            work(*args)
        except (Death, CheckpointException):
            pass
    return next(count) > number


def _save_and_copy(run: Path, form: str, step: int) -> None:
    """Save `last` as training does, and publish it as `best` as well."""
    content = {
        "state_dict": {"model.w": torch.full((8,), float(step))},
        "optimizer_states": [],
        "hyper_parameters": {"implementation": "mingpt", "model_config": {}},
        "global_step": step,
    }
    last = run / "checkpoints" / "last.ckpt"
    if form == "file":
        WholeFiles().save_checkpoint(content, last)
    else:
        FSDP(world_size=1, accelerator="cpu").save_checkpoint(content, last)
    copy_checkpoint(last, last.with_name("best.ckpt"))


def _found(run: Path) -> tuple[int, int]:
    """Return the steps of `last` and `best` as the next run finds them, which must be complete."""
    steps = []
    for which in ("last", "best"):
        path = find_checkpoint(str(run), which=which)
        assert verify_checksums(path)
        checkpoint = open_checkpoint(path)
        assert checkpoint.weight("w").tolist() == [checkpoint.step] * 8
        steps.append(checkpoint.step)
    return steps[0], steps[1]


def _clone(source: Path, target: Path) -> None:
    """Copy a folder with its hard links."""
    copies = {}

    def copy(file, to):
        known = copies.setdefault(os.stat(file).st_ino, to)
        shutil.copyfile(file, to) if known == to else os.link(known, to)

    shutil.copytree(source, target, copy_function=copy)


def _state(run: Path) -> tuple:
    return tuple((p, p.stat().st_nlink, p.read_bytes() if p.is_file() else b"") for p in sorted(run.rglob("*")))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("form", "deaths"), [("file", 2), ("folder", 1), pytest.param("folder", 2, marks=pytest.mark.slow)]
)
def test_deaths_at_any_change_of_the_disk_leave_the_newest_complete_checkpoint(tmp_path, form, deaths):
    run, start, between = tmp_path / "run", tmp_path / "start", 0
    found = {}  # by state of the disk, because flushes do not change it
    for first in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        _save_and_copy(run, form, 1)
        died = _dies_at(first, _save_and_copy, run, form, 2)
        between += not (run / "checkpoints" / "last.ckpt").exists()
        state = _state(run)
        if not died:
            assert _found(run) == (2, 2)
            break
        if state in found:
            continue
        found[state] = last, best = _found(run)
        assert {last, best} <= {1, 2}
        _clone(run, start)
        # Every third second death, in turn with the first one: all of them take three times as long.
        for second in itertools.count(first % 3, 3) if deaths == 2 else (999,):
            died = _dies_at(second, _save_and_copy, run, form, 3, changes=CHANGES[1:])
            if (state := _state(run)) not in found:
                found[state] = _found(run)
            assert found[state][0] >= last and found[state][1] >= best, (first, second)
            if not died:
                break
            shutil.rmtree(run)
            _clone(start, run)
        assert found[state] == (3, 3)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        shutil.rmtree(start)
    assert len(found) > 8 and (between > 0) == (form == "folder"), (len(found), between)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_error_is_an_oserror_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, form, call):
    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    _save_and_copy(tmp_path, form, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(OSError, match="No space left"):
            _save_and_copy(tmp_path, form, 2)
    assert _found(tmp_path) == (1, 1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_file_that_exceeds_the_size_limit_is_an_oserror(tmp_path):
    """A write fails inside of torch.save, which turns it into a RuntimeError."""
    resource = pytest.importorskip("resource")
    _save_and_copy(tmp_path, "file", 1)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            WholeFiles().save_checkpoint({"w": torch.zeros(10_000)}, tmp_path / "checkpoints" / "last.ckpt")
        except OSError as error:
            os._exit(error.errno)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert _found(tmp_path) == (1, 1) and len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_saving_over_an_unfinished_copy_does_not_write_into_its_source(tmp_path):
    _save_and_copy(tmp_path, "file", 1)
    best = tmp_path / "checkpoints" / "best.ckpt"
    os.link(best, best.with_name("last.ckpt.part"))  # as a copy leaves it that was killed before its rename
    before = best.read_bytes()
    WholeFiles().save_checkpoint({"w": torch.zeros(9)}, best.with_name("last.ckpt"))
    assert best.read_bytes() == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_incomplete_folder_does_not_replace_the_complete_old_one(tmp_path):
    """After a kill between the renames of the swap, with `last` cut off by something else."""
    _save_and_copy(tmp_path, "folder", 1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    shutil.copytree(last, last.with_name("last.ckpt.old"))
    (last / ".metadata").unlink()
    replace, calls = os.replace, []

    def dies_at_the_last(source, target):
        if Path(target) == last:
            raise Death
        calls.append(target)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dies_at_the_last)
        with contextlib.suppress(Death):
            _save_and_copy(tmp_path, "folder", 2)
    assert calls and find_checkpoint(str(tmp_path), which="last").name == "last.ckpt.old"
    _save_and_copy(tmp_path, "folder", 3)
    assert _found(tmp_path) == (3, 3)


# Script: save 64 MB, and print by how many MiB the peak of resident memory grew.
MEMORY = """
import resource, sys, torch
from lightning_gpt.strategies.saving import WholeFiles

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

weights = {str(n): torch.rand(2_000_000) for n in range(8)}
WholeFiles().save_checkpoint({"w": torch.zeros(9)}, sys.argv[1])
before = peak()
WholeFiles().save_checkpoint(weights, sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_file_is_streamed_beside_its_target(tmp_path):
    (tmp_path / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").chmod(0o500)
    command = [sys.executable, "-c", MEMORY, tmp_path / "last.ckpt"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16


def _tree(path):
    if path.is_file():
        return path.read_text()
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def _make(path, kind, text):
    if kind == "folder":
        (path / "checkpoint").mkdir(parents=True)
        (path / ".metadata").write_text(text)
        path = path / "checkpoint" / "shard"
    path.write_text(text)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [None, "file", "folder", "same"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_copy_replaces_a_checkpoint_and_outlives_its_source(tmp_path, monkeypatch, kind, before, links):
    def refuses(*args, **kwargs):
        raise PermissionError("no hard links here")

    source, target = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    _make(source, kind, "new")
    if before == "same":
        copy_checkpoint(source, target)
    elif before:
        _make(target, before, "old")
    if not links:
        monkeypatch.setattr(os, "link", refuses)
    copy_checkpoint(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert _tree(target) == _tree(source) and not target.is_symlink()
    files = [source, target] if kind == "file" else [source / ".metadata", target / ".metadata"]
    assert (files[0].stat().st_ino == files[1].stat().st_ino) == links
    kept = _tree(source)
    saving.remove(source)
    assert _tree(target) == kept
