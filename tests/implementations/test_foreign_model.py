"""A model of the user's own, from a file outside this repository, trained and scored from the command line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

MODEL = '''
{first_line}
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn


@dataclass
class Sizes:
    vocab_size: int
    block_size: int
    width: int = 8
    """how wide the embedding of my model is"""
    scaled: bool = False
    """whether the embedding is scaled"""


class MyGPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.head(self.embedding(idx))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss
'''
# Not the tiny model's flags: this one has other sizes.
FLAGS = (
    "--implementation my_model:MyGPT --width 12 --scaled --block_size 16 --batch_size 8 --max_steps 40"
    " --eval_interval 20 --log_every_n_steps 5 --warmup_steps 0 --learning_rate 3e-2 --logger csv --accelerator cpu"
    " --out_dir out"
).split()


def _run(folder, script, *flags):
    return subprocess.run(
        [sys.executable, str(REPO / script), *flags],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module", params=["", "from __future__ import annotations"], ids=["plain", "annotations"])
def folder(request, tmp_path_factory):
    """Where the user's file lies; annotations are texts in one of the two."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_model.py").write_text(MODEL.format(first_line=request.param).lstrip())
    return folder


@pytest.fixture(scope="module")
def trained(folder, text_file):
    """The process that trained it there."""
    done = _run(folder, "train.py", *FLAGS, "--data", str(text_file))
    assert done.returncode == 0, done.stderr
    return done


def test_help_lists_its_fields(folder):
    done = _run(folder, "train.py", "--implementation", "my_model:MyGPT", "--help")
    assert done.returncode == 0, done.stderr
    assert "--width" in done.stdout and "how wide the embedding of my model is" in " ".join(done.stdout.split())
    assert "--n_layer" not in done.stdout and "--vocab_size" not in done.stdout


def test_loss_falls_and_there_is_a_sample(folder, trained):
    with open(next((folder / "out" / "logs").glob("*/metrics.csv"))) as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    assert "--- sample ---" in trained.stdout


def test_it_is_scored(folder, trained):
    done = _run(folder, "evaluate.py", "--checkpoint", "out", "--accelerator", "cpu")
    assert done.returncode == 0, done.stderr
    scores = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert 0 < float(scores["loss"]) < 2.9 and int(scores["step"]) <= 40


def test_it_writes_text_without_a_generate_of_its_own(folder, trained):
    done = _run(folder, "sample.py", "--checkpoint=out", "--accelerator=cpu", "--prompt=the", "--max_new_tokens=30")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the") and len(done.stdout) == 3 + 30 + 1


def test_it_goes_on(folder, trained):
    done = _run(folder, "train.py", "--resume", "out", "--max_steps", "45")
    assert done.returncode == 0, done.stderr
