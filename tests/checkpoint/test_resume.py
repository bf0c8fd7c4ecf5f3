"""Resume is exact: in a single CPU process, a resumed run is bit-identical to an uninterrupted one."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

REPO = Path(__file__).parents[2]
STEPS = 12
SIZES = ["--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "8"]
LOGGED = ["--logger", "csv", "--log_every_n_steps", "1", "--sample_tokens", "0", "--accelerator", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Write 900 training characters, which are 111 windows of 8, and 100 validation characters."""
    drawn = random.Random(0).choices("abcdefgh \n", k=1000)
    path = tmp_path / "text.txt"
    path.write_text("".join(drawn))
    return str(path)


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def losses(run: Path) -> dict[int, tuple[str, str]]:
    """Return loss and gradient norm by optimizer step, as text, from all log files of a run."""
    found = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(file.open()):
            if row["train_loss"]:
                found[int(float(row["step"]))] = (row["train_loss"], row["grad_norm"])
    return found


def assert_bit_identical(a: Path, b: Path) -> None:
    ours, theirs = checkpoint(a), checkpoint(b)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    assert ours["TokenData"] == theirs["TokenData"]
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    torch.testing.assert_close(
        ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"], rtol=0, atol=0
    )
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert losses(a) == losses(b)
    assert sorted(losses(a)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("implementation", "stop", "batch_size", "accumulate", "optimizer"),
    [
        ("mingpt", 6, 4, 1, "adamw"),  # mid-pass, with dropout
        ("mingpt", 5, 4, 3, "adamw"),  # accumulation, and a stop between two validations
        ("nanogpt", 10, 11, 1, "adamw"),  # a pass has 110 windows: stopped exactly at its end
        ("nanogpt", 7, 40, 1, "muon"),  # in the third pass
    ],
)
def test_resume_is_bit_identical(
    tmp_path: Path, text: str, implementation: str, stop: int, batch_size: int, accumulate: int, optimizer: str
) -> None:
    flags = ["--implementation", implementation, "--data", text, *SIZES, *LOGGED, "--batch_size", str(batch_size)]
    flags += ["--accumulate_grad_batches", str(accumulate), "--eval_interval", "3", "--lr_decay_steps", str(STEPS)]
    flags += ["--optimizer", optimizer]
    if implementation == "nanogpt":
        flags += ["--dropout", "0.2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--max_steps", str(STEPS), "--out_dir", str(whole)])
    train.main([*flags, "--max_steps", str(stop), "--out_dir", str(parts)])
    assert checkpoint(parts)["global_step"] == stop
    train.main(["--resume", str(parts), "--max_steps", str(STEPS), *LOGGED])
    assert_bit_identical(whole, parts)


def test_resume_after_a_crash_continues_from_the_last_save(tmp_path: Path, text: str) -> None:
    flags = ["--data", text, *SIZES, *LOGGED, "--batch_size", "4", "--eval_interval", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--max_steps", str(STEPS), "--out_dir", str(whole)])
    code = (
        "import os, train, lightning\n"
        "class Crash(lightning.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 6: os._exit(9)\n"
        "import lightning_gpt.training.trainer as t\n"
        "build = t.Trainer\n"
        "t.Trainer = lambda **k: build(**{**k, 'callbacks': [*k['callbacks'], Crash()]})\n"
        f"train.main({[*flags, '--max_steps', str(STEPS), '--out_dir', str(parts)]!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True).returncode == 9
    assert checkpoint(parts)["global_step"] == 4
    train.main(["--resume", str(parts)])  # all settings come from the saved run
    ours, theirs = checkpoint(whole), checkpoint(parts)
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    assert ours["TokenData"] == theirs["TokenData"]


def test_resume_after_a_crash_between_two_renames(tmp_path: Path, text: str) -> None:
    """Resume from last.ckpt.old, which is all there is if a crash interrupts the replacement of a folder."""
    flags = ["--data", text, *SIZES, *LOGGED, "--batch_size", "4"]
    train.main([*flags, "--max_steps", "2", "--out_dir", str(tmp_path / "r")])
    saved = tmp_path / "r" / "checkpoints"
    (saved / "last.ckpt").rename(saved / "last.ckpt.old")
    (saved / "best.ckpt").unlink()
    train.main(["--resume", str(tmp_path / "r"), "--max_steps", "4"])
    assert checkpoint(tmp_path / "r")["global_step"] == 4


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_on_two_ranks_sees_the_same_samples(tmp_path: Path, text: str, accumulate: int) -> None:
    """Train with 12 samples per step in one process, then on two ranks with 6 each; compare the losses."""
    flags = ["--implementation", "nanogpt", "--data", text, *SIZES, *LOGGED, "--eval_interval", "3"]
    flags += ["--lr_decay_steps", str(STEPS)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--batch_size", "12", "--max_steps", str(STEPS), "--out_dir", str(whole)])
    train.main([*flags, "--batch_size", "12", "--max_steps", "5", "--out_dir", str(parts)])
    two = ["--strategy", "ddp", "--devices", "2", "--batch_size", str(6 // accumulate)]
    two += ["--accumulate_grad_batches", str(accumulate), "--max_steps", str(STEPS), *LOGGED]
    command = [sys.executable, str(REPO / "train.py"), "--resume", str(parts), *two]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    ours, theirs = losses(whole), losses(parts)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    for step in ours:
        assert [float(x) for x in ours[step]] == pytest.approx([float(x) for x in theirs[step]], rel=2e-5), step
    assert checkpoint(whole)["TokenData"] == checkpoint(parts)["TokenData"]
    torch.testing.assert_close(checkpoint(whole)["state_dict"], checkpoint(parts)["state_dict"], rtol=1e-4, atol=1e-5)
