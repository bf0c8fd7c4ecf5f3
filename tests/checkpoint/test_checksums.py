"""Checksums: every changed bit of a checkpoint is refused by --resume and --verify; older checkpoints have none."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from lightning_gpt.checkpoint import canonical_folder, convert, find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.write import canonical
from lightning_gpt.checksums import MANIFEST, verify_checksums
from lightning_gpt.config import UserError
from tests.launching import run_python

REPO = Path(__file__).parents[2]
FLIPS = 40
FORMS = ("single", "converted", "fsdp", "deepspeed_stage_2")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tiny_run, tiny_flags, text_file):
    """Return a function that returns a run folder whose `last` has a form; read-only."""
    made = {"single": tiny_run}

    def make(form: str) -> Path:
        if form in made:
            return made[form]
        run = tmp_path_factory.mktemp("forms") / form
        if form == "converted":
            checkpoint = open_checkpoint(tiny_run / "checkpoints" / "last.ckpt")
            convert(checkpoint, run / "checkpoints" / "last", optimizer=True)
            shutil.copy(tiny_run / "config.yaml", run)
        else:
            if form != "fsdp":
                pytest.importorskip("deepspeed")
            flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", f"--strategy={form}", "--devices=1"]
            done = run_python("train.py", *flags, "--max_steps=1", "--eval_interval=1", "--sample_tokens=0")
            assert done.returncode == 0, done.stderr[-3000:]
        made[form] = run
        return run

    return make


@pytest.fixture(params=FORMS)
def last(request, run_of, tmp_path) -> Path:
    """Return the last checkpoint of a run of each form, which a test may change."""
    run = tmp_path / "run"
    shutil.copytree(run_of(request.param), run)
    return run / "checkpoints" / ("last" if request.param == "converted" else "last.ckpt")


def _flips(path: Path) -> list[tuple[Path, int]]:
    """Return about `FLIPS` files and offsets: both ends of each file, and random ones."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    draw = random.Random(0)
    places = [(file, at) for file in files for at in (0, file.stat().st_size // 2, file.stat().st_size - 1)]
    while len(places) < FLIPS:
        file = draw.choice(files)
        places.append((file, draw.randrange(file.stat().st_size)))
    if path.is_file():  # the checksum itself, and the length of its record
        places += [(path, path.stat().st_size - back) for back in (72, 71, 65, 64)]
    return places


def test_each_flipped_bit_is_refused_on_resume(last, refused):
    argv = [f"--resume={last}", "--max_steps=9"]
    for number, (file, at) in enumerate(_flips(last)):
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << number % 8]) + whole[at + 1 :])
        line = refused(train.main, *argv, mentions=str(last))
        assert file.name == MANIFEST or f"error: {file} is damaged: " in line, (file, at, line)
        file.write_bytes(whole)
    assert verify_checksums(last).files == (
        len([p for p in last.rglob("*") if p.is_file()]) - 1 if last.is_dir() else 1
    )


def test_verify_checks_what_is_evaluated_and_sampled_and_started_from(last, refused, capsys, text_file):
    out = ["--accelerator=cpu", "--verify"]
    calls = {
        evaluate.main: [f"--checkpoint={last}", "--eval_batches=1", *out],
        sample.main: [f"--checkpoint={last}", "--max_new_tokens=1", "--prompt=a", *out],
        train.main: [f"--init_from={last}", f"--data={text_file}", "--dry_run", *out],
    }
    for main, argv in calls.items():
        main(argv)
        assert f"{last}: verified " in capsys.readouterr().err
    file = max((p for p in [last, *last.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        byte = damaged.read(1)[0]
        damaged.seek(-1, 1)
        damaged.write(bytes([byte ^ 4]))
    for main, argv in calls.items():
        refused(main, *argv, mentions=f"error: {file} is damaged: ")


def test_verify_checks_an_existing_conversion_too(run_of, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_of("fsdp"), run)
    argv = [f"--checkpoint={run}", "--which=last", "--accelerator=cpu", "--eval_batches=1", "--verify"]
    evaluate.main(argv)
    weights = canonical_folder(run / "checkpoints" / "last.ckpt") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {weights} is damaged: ")


def test_checkpoints_without_checksums_are_resumed_and_verify_says_so(last, capsys, tmp_path):
    if last.is_file():
        torch.save(torch.load(last, weights_only=False), last)
    else:
        (last / MANIFEST).unlink()
        if (last / "meta.pt").exists():
            header = torch.load(last / "meta.pt", weights_only=False)
            del header["checksums"]
            torch.save(header, last / "meta.pt")
        for file in last.glob("checkpoint/*model_states.pt"):
            states = torch.load(file, weights_only=False)
            del states["checksums"]
            torch.save(states, file)
    if last.name == "last.ckpt":
        assert find_checkpoint(str(last.parent.parent), which="last") == last
    train.main([f"--resume={last}", "--max_steps=9", "--dry_run"])
    assert "verif" not in capsys.readouterr().err
    evaluate.main([f"--checkpoint={last}", "--accelerator=cpu", "--eval_batches=1", "--verify"])
    assert f"{last}: no checksums to verify against\n" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_conversion_deletes_what_a_killed_one_left(tiny_run, tmp_path, monkeypatch):
    checkpoint, folder = open_checkpoint(tiny_run / "checkpoints" / "last.ckpt"), tmp_path / "last"

    def child():
        monkeypatch.setattr(canonical, "swap_in", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        convert(checkpoint, folder)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob(".last.????????.part")] and not folder.exists()
    (tmp_path / ".lastly.01234567.part").mkdir()
    assert verify_checksums(convert(checkpoint, folder)).files == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lastly.01234567.part", "last"]


@pytest.mark.parametrize("last", FORMS[2:], indirect=True)
def test_folder_that_lost_files_is_no_checkpoint(last, refused):
    old, best = last.with_name("last.ckpt.old"), last.with_name("best.ckpt")
    for file in sorted(p for p in last.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        file.unlink()
        argv = [f"--resume={last.parent.parent}", "--max_steps=9"]
        line = refused(train.main, *argv, mentions=f"{last} is incomplete: ")
        assert file.relative_to(last).as_posix() in line and best.exists()
        with pytest.raises(UserError, match="is incomplete|is not a checkpoint"):
            open_checkpoint(last)
        shutil.copytree(best, old)
        assert find_checkpoint(str(last.parent.parent), which="last") == old
        shutil.rmtree(old)
        file.write_bytes(whole)
    assert find_checkpoint(str(last.parent.parent), which="last") == last


@pytest.mark.parametrize("name", ["x" * 5000, "../outside", "/etc/hostname"])
def test_manifest_of_impossible_names_is_damaged(name, tmp_path):
    digest = "0" * 64
    (tmp_path / MANIFEST).write_text(f"{digest}  {name}\n# 1 files\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        verify_checksums(tmp_path)
