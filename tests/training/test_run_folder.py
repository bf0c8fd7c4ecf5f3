"""Run folders: resuming by itself after a restart, refusing to replace a run, and what config.yaml records."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch
import yaml

import train
from lightning_gpt import parse_train
from lightning_gpt.training.run import train as train_config

REPO = Path(__file__).parents[2]


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def step(run: Path) -> int:
    return torch.load(last(run), weights_only=True)["global_step"]


class Crash(lightning.Callback):
    """Fail before the step after `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("crash")


@pytest.fixture
def flags(tiny_flags, text_file) -> list[str]:
    return [*tiny_flags, f"--data={text_file}", "--sample_tokens=0"]


@pytest.fixture
def copied_run(tiny_run, tmp_path) -> Path:
    """Return a copy of `tiny_run` to write into: 4 steps, finished."""
    return shutil.copytree(tiny_run, tmp_path / "copy")


@pytest.fixture
def slurm(monkeypatch):
    """Return a function that sets the variables of a SLURM job that was requeued some number of times."""

    def job(number: int, *, restarts: int) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return job


def test_resume_auto_starts_goes_on_and_ends(flags, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train([*flags, f"--out_dir={run}", "--resume=auto"]), callbacks=[Crash(3)])
    assert step(run) == 2
    capsys.readouterr()
    train.main([*flags, f"--out_dir={run}", "--resume=auto"])
    assert "step 4: " in capsys.readouterr().out and step(run) == 4
    train.main([*flags, f"--out_dir={run}", "--resume=auto"])
    out = capsys.readouterr().out
    assert out == f"finished  {last(run)} is at step 4 of 4; nothing to do\n"


def test_resume_auto_needs_a_folder(flags, refused):
    refused(train.main, *flags, "--resume=auto", mentions=["--resume auto", "--out_dir"])


def test_resume_auto_skips_a_damaged_checkpoint(copied_run, flags, capsys):
    last(copied_run).write_bytes(last(copied_run).read_bytes()[:1000])
    config = parse_train([*flags, f"--out_dir={copied_run}", "--resume=auto"])
    assert config.run.resume == str(copied_run / "checkpoints" / "best.ckpt")
    assert f"skipped: {last(copied_run)}" in capsys.readouterr().err


def test_requeued_job_goes_on_in_its_folder(flags, tmp_path, monkeypatch, slurm):
    monkeypatch.chdir(tmp_path)
    slurm(42, restarts=0)
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train(flags), callbacks=[Crash(1)])  # before the first checkpoint
    slurm(42, restarts=1)
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train(flags), callbacks=[Crash(3)])
    slurm(42, restarts=2)
    train.main(flags)
    (run,) = (tmp_path / "runs").iterdir()
    assert step(run) == 4
    sessions = yaml.safe_load((run / "config.yaml").read_text())["_provenance"]["sessions"]
    assert [session["step"] for session in sessions] == [0, 2]


def test_restart_takes_only_runs_of_its_own_launch_and_command(flags, tmp_path, monkeypatch, slurm):
    monkeypatch.chdir(tmp_path)
    slurm(42, restarts=0)
    config = parse_train([*flags, "--max_steps=2"])
    run = train_config(config)
    slurm(42, restarts=1)
    assert parse_train([*flags, "--max_steps=2"]).run.resume == str(last(tmp_path / run))
    assert parse_train([*flags, "--max_steps=3"]).run.resume is None  # another training of the same job
    assert parse_train([*flags, "--max_steps=3", f"--out_dir={run}"]).run.resume == str(last(tmp_path / run))
    slurm(43, restarts=1)
    assert parse_train([*flags, "--max_steps=2"]).run.resume is None


def test_restart_of_a_resumed_run_goes_on_from_its_own_last_save(copied_run, flags, slurm):
    """Start again at the checkpoint that was named until a later one has been saved."""
    best = copied_run / "checkpoints" / "best.ckpt"
    command = [f"--resume={best}", "--max_steps=8", "--sample_tokens=0"]
    slurm(42, restarts=0)
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train(command), callbacks=[Crash(step(copied_run))])
    slurm(42, restarts=1)
    assert parse_train(command).run.resume == str(best)
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train(command), callbacks=[Crash(7)])
    assert step(copied_run) == 6 and parse_train(command).run.resume == str(last(copied_run))


def test_resume_alone_takes_the_newest_run_or_none(copied_run, flags, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    shutil.copytree(copied_run, runs / "older")
    assert parse_train(["--resume"]).run.resume == str(last(runs / "older"))
    (runs / "newer").mkdir()
    time.sleep(0.01)
    shutil.copyfile(copied_run / "config.yaml", runs / "newer" / "config.yaml")
    refused(train.main, "--resume", mentions=["runs/newer", "no checkpoint"])


RESTARTED = """
import os, sys, lightning
from lightning_gpt import parse_train, train
class Crash(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
print("FOLDER", train(parse_train(sys.argv[1:]), callbacks=[Crash()]), flush=True)
"""


@pytest.mark.slow
def test_torchrun_restart_goes_on_in_one_folder(flags, tmp_path):
    (tmp_path / "script.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "script.py", *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert step(run) == 4 and done.stdout.count(f"FOLDER {tmp_path / 'runs' / run.name}\n") == 2, done.stdout
    sessions = yaml.safe_load((run / "config.yaml").read_text())["_provenance"]["sessions"]
    assert [session["step"] for session in sessions] == [0, 2]
