"""Run folders: resuming by itself after a restart, refusing to replace a run, and what config.yaml records."""

import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import lightning
import pytest
import torch
import yaml

import train
from lightning_gpt import UserError, parse_train
from lightning_gpt.training.folder import LOCK
from lightning_gpt.training.run import train as train_config

REPO = Path(__file__).parents[2]


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def step(run: Path) -> int:
    return torch.load(last(run), weights_only=True)["global_step"]


def record(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


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
    assert [session["step"] for session in record(run)["_provenance"]["sessions"]] == [0, 2]


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


RESTARTED = r"""
import os, sys, lightning
from lightning_gpt import parse_train, train
class Crash(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
folder = train(parse_train(sys.argv[1:]), callbacks=[Crash()])
print(f"\nFOLDER {folder}\n", end="", flush=True)  # one write, which no line of the other rank divides
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
    assert [session["step"] for session in record(run)["_provenance"]["sessions"]] == [0, 2]


def test_folder_with_checkpoints_is_refused(copied_run, flags, refused):
    before = last(copied_run).read_bytes()
    refused(train.main, *flags, f"--out_dir={copied_run}", mentions=[copied_run, "--resume", "--overwrite"])
    refused(train.main, *flags, f"--out_dir={copied_run}", "--resume=auto", "--overwrite", mentions="--overwrite")
    assert last(copied_run).read_bytes() == before
    elsewhere = shutil.copy(last(copied_run), copied_run.parent / "other.ckpt")
    resumed = [f"--resume={elsewhere}", f"--out_dir={copied_run}", "--max_steps=6"]
    refused(train.main, *flags, *resumed, mentions=[copied_run, "holds the checkpoints"])


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(copied_run, flags, refused):
    saved = copied_run / "checkpoints"
    shutil.copy(last(copied_run), saved / "last.ckpt.old")
    (saved / "step-2.ckpt.part").mkdir()
    for kept in (copied_run / "notes.txt", saved / "notes.txt", copied_run / "logs" / "notes.txt"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("mine")
    (copied_run / "logs" / "version_7").mkdir()
    overwrite = [*flags, f"--out_dir={copied_run}", "--overwrite", "--logger=csv"]
    refused(train.main, *overwrite, "--precision=7", mentions="--precision")
    refused(train.main, *overwrite, f"--init_from={copied_run}", mentions=["--overwrite", copied_run])
    assert step(copied_run) == 4 and (saved / "last.ckpt.old").exists()
    train.main([*overwrite, "--max_steps=2"])
    assert step(copied_run) == 2
    assert {path.name for path in saved.iterdir()} == {"last.ckpt", "best.ckpt", "notes.txt"}
    assert {path.name for path in (copied_run / "logs").iterdir()} == {"version_0", "notes.txt"}
    assert (copied_run / "notes.txt").exists()


def test_overwrite_of_a_restarted_run_goes_on(copied_run, flags, slurm):
    overwrite = [*flags, f"--out_dir={copied_run}", "--overwrite"]
    slurm(42, restarts=1)  # the first start ended before it opened the folder
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train(overwrite), callbacks=[Crash(3)])
    assert step(copied_run) == 2
    assert parse_train(overwrite).run.resume == str(last(copied_run))


def test_second_run_in_a_folder_is_refused_until_the_first_is_gone(copied_run, refused):
    code = "import pathlib, sys, time; from lightning_gpt.atomic import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(copied_run / LOCK)]
    resume = [f"--resume={copied_run}", "--max_steps=5"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        refused(train.main, *resume, mentions=[copied_run, "in use by another run"])
        first.kill()
    train.main(resume)
    assert step(copied_run) == 5
    train.main([f"--resume={copied_run}", "--max_steps=6"])  # released at the end


def test_resume_says_where_it_starts_and_what_differs(copied_run, flags, capsys):
    options = ["--learning_rate=5e-4", "--attn_pdrop=0", "--max_steps=8", "--sample_tokens=0"]
    train.main([f"--resume={copied_run}", *options])
    out = capsys.readouterr().out
    assert out.startswith(f"resuming {copied_run} at step 4\nchanged   ")
    changed = set(out.splitlines()[1].removeprefix("changed   ").split(", "))
    assert changed == {
        "learning_rate 0.001 -> 0.0005",
        "min_learning_rate 0.0001 -> 5e-05",
        "lr_decay_steps 4 -> 8",
        "max_steps 4 -> 8",
        "sample_tokens 8 -> 0",
        "attn_pdrop 0.1 -> 0.0",
    }
    bare = shutil.copy(last(copied_run), copied_run.parent / "bare.ckpt")
    capsys.readouterr()
    others = [flag for flag in flags if not flag.startswith(("--n_", "--block_size"))]  # the checkpoint has its sizes
    train.main([f"--resume={bare}", *others, f"--out_dir={copied_run.parent / 'other'}", *options[1:], "--max_steps=9"])
    assert capsys.readouterr().out.startswith(f"resuming {bare} at step 8\nmodel ")


def test_resumed_run_keeps_the_model_of_its_checkpoint(copied_run, refused):
    """Change config.yaml: the checkpoint's own config counts."""
    file = copied_run / "config.yaml"
    text = file.read_text()
    assert "n_head: 1\n" in text and "embd_pdrop: 0.1\n" in text
    file.write_text(text.replace("n_head: 1\n", "n_head: 2\n").replace("embd_pdrop: 0.1\n", "embd_pdrop: 0.3\n"))
    resumed = parse_train([f"--resume={copied_run}"]).model_fields
    assert (resumed["n_head"], resumed["embd_pdrop"]) == (1, 0.1)
    resume = [f"--resume={copied_run}", "--max_steps=8"]
    refused(train.main, *resume, "--n_head=2", mentions=["--n_head 2 contradicts", "whose n_head is 1"])
    refused(train.main, *resume, "--block_size=8", mentions="--block_size 8 contradicts")
    refused(train.main, *resume, "--model_type=gpt-nano", mentions="contradicts")


OWN_MODEL = '''
from dataclasses import dataclass, field
from torch import nn
from torch.nn import functional as F

@dataclass
class Config:
    vocab_size: int
    block_size: int
    width: int = 8
    shift: int = 0
    """tokens to look back"""
    dropout: float = 0.0
    attention: str = field(default="all", metadata={"changeable": False})
    noise: float = field(default=0.0, metadata={"changeable": True})

class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.shift = config.shift
        self.body = nn.Sequential(nn.Embedding(config.vocab_size, config.width), nn.Dropout(config.dropout))
        self.head = nn.Linear(config.width, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.head(self.body(idx.roll(self.shift, dims=1)))
        return logits, None if targets is None else F.cross_entropy(logits.mT, targets, ignore_index=-1)
'''


def test_fields_of_own_models_are_compared(text_file, tmp_path, monkeypatch, refused, capsys):
    (tmp_path / "shifting.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [
        "--implementation=shifting:Model",
        f"--data={text_file}",
        "--block_size=8",
        "--max_steps=1",
        "--logger=none",
    ]
    train.main([*flags, "--out_dir=run", "--shift=1", "--accelerator=cpu", "--sample_tokens=0"])
    resume = ["--resume=run", "--max_steps=2"]
    for name, value in (("shift", 2), ("attention", "local"), ("width", 9)):
        refused(train.main, *resume, f"--{name}={value}", mentions=f"--{name} {value} contradicts")
    capsys.readouterr()
    train.main([*resume, "--dropout=0.5", "--noise=0.5"])
    assert "dropout 0.0 -> 0.5, noise 0.0 -> 0.5" in capsys.readouterr().out


@pytest.fixture(scope="module")
def defaulted_run(tmp_path_factory, text_file) -> Path:
    """Train with a budget in tokens and all else defaulted; read-only."""
    run = tmp_path_factory.mktemp("defaulted") / "run"
    flags = [f"--data={text_file}", "--block_size=16", "--batch_size=2", "--max_tokens=700", "--logger=none"]
    train.main([*flags, "--eval_batches=2", "--accelerator=cpu", f"--out_dir={run}", "--sample_tokens=0"])
    return run


def test_config_holds_every_resolved_value(defaulted_run):
    saved = record(defaulted_run)
    resolved = {"max_steps": 22, "max_tokens": None, "lr_decay_steps": 22, "warmup_steps": 2}
    resolved |= {"model_type": "gpt-micro", "n_layer": 4, "n_head": 4, "n_embd": 128, "tokenizer": "char"}
    resolved |= {"accumulate_grad_batches": 1, "min_learning_rate": 1e-4, "seed": 1337}
    assert {name: saved[name] for name in resolved} == resolved
    provenance = saved["_provenance"]
    assert provenance["versions"]["torch"] == version("torch") and provenance["devices"] == "1 x cpu"
    assert "deepspeed" not in provenance["versions"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    assert head.returncode or provenance["git"]["commit"] == head.stdout.strip()
    (session,) = provenance["sessions"]
    assert session["command"].startswith("train.py --data=") and session["step"] == 0


def test_config_reproduces_the_run_bit_for_bit(defaulted_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([f"--config={defaulted_run / 'config.yaml'}"])
    (again,) = (tmp_path / "runs").iterdir()  # a folder of its own
    ours, theirs = (torch.load(last(run), weights_only=True)["state_dict"] for run in (again, defaulted_run))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    first, second = record(defaulted_run), record(again)
    del first["_provenance"], second["_provenance"]
    assert first == second


def test_resume_resolves_defaults_again(defaulted_run):
    kept = parse_train([f"--resume={defaulted_run}"])
    assert (kept.trainer.max_steps, kept.trainer.max_tokens) == (None, 700)
    longer = parse_train([f"--resume={defaulted_run}", "--max_steps=2000"])
    assert (longer.trainer.max_steps, longer.trainer.max_tokens) == (2000, None)
    assert (longer.optim.warmup_steps, longer.optim.lr_decay_steps, longer.optim.min_learning_rate) == (None,) * 3
    assert longer.optim.accumulate_grad_batches is None and longer.data.tokenizer is None


class Put(lightning.Callback):
    """Use an operation that has no deterministic implementation."""

    def on_train_batch_start(self, *_: object) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_deterministic_runs_refuse_what_depends_on_timing(flags, tmp_path, refused):
    run = [*flags, "--deterministic", "--max_steps=1"]
    train.main([*run, f"--out_dir={tmp_path / 'run'}"])
    assert record(tmp_path / "run")["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(UserError, match="--deterministic: put_ has no deterministic implementation"):
        train_config(parse_train([*run, f"--out_dir={tmp_path / 'put'}"]), callbacks=[Put()])
    refused(train.main, *run, "--compile=max-autotune", mentions=["--deterministic", "timing"])
    refused(train.main, *run, "--trainer.benchmark=true", mentions=["--deterministic", "timing"])
