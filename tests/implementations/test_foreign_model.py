"""A user's own model in a file outside this repository: trained, evaluated and sampled from the command line."""

import csv
import importlib
import os
import sys
from pathlib import Path

import pytest

import evaluate
import sample
import train
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from tests.launching import run_python

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
# Not tiny_flags, because this model has other fields.
FLAGS = (
    "--width 12 --scaled --block_size 16 --batch_size 8 --max_steps 40 --eval_interval 20 --log_every_n_steps 5"
    " --warmup_steps 0 --learning_rate 3e-2 --logger csv --accelerator cpu --out_dir out"
).split()


@pytest.fixture(
    scope="module",
    params=[("plain_model", ""), ("annotated_model", "from __future__ import annotations")],  # annotations are strings
    ids=lambda param: param[0],
)
def name(request, tmp_path_factory):
    """Write the model's file to the working directory, and return its --implementation."""
    folder, (module, first_line) = tmp_path_factory.mktemp("mine"), request.param
    (folder / f"{module}.py").write_text(MODEL.format(first_line=first_line).lstrip())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        importlib.invalidate_caches()
        yield f"{module}:MyGPT"
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def trained(name, text_file):
    """Train the model in a separate process, which finds the file in the working directory."""
    command = [REPO / "train.py", "--implementation", name, *FLAGS, "--data", text_file]
    done = run_python(*command, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done


def losses(column):
    """Return the values of a column in the newest log."""
    newest = max(Path("out/logs").glob("*/metrics.csv"), key=os.path.getmtime)
    with open(newest) as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_help_lists_the_fields_of_the_model(name, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--implementation", name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--width" in out and "how wide the embedding of my model is" in " ".join(out.split())
    assert "--n_layer" not in out and "--vocab_size" not in out


def test_training_lowers_the_loss_and_prints_a_sample(trained):
    found = losses("train_loss")
    assert len(found) == 8 and found[-1] < found[0] - 0.5
    assert "--- sample ---" in trained.stdout


@pytest.mark.usefixtures("trained")
def test_evaluate_reports_the_loss_of_the_best_validation(capsys):
    validations = losses("val_loss")
    evaluate.main(["--checkpoint", "out", "--accelerator", "cpu"])
    scores = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert len(validations) == 2 and validations[1] < validations[0] < 3.5
    assert float(scores["loss"]) == pytest.approx(validations[1], abs=1e-4) and scores["step"] == "40"


@pytest.mark.usefixtures("trained")
def test_sample_works_without_a_generate_method(capsys):
    sample.main(["--checkpoint=out", "--accelerator=cpu", "--prompt=the", "--max_new_tokens=30"])
    out = capsys.readouterr().out
    assert out.startswith("the") and len(out) == 3 + 30 + 1


@pytest.mark.usefixtures("trained")
def test_resume_continues_from_the_last_step(capsys):
    before = open_checkpoint(find_checkpoint("out", which="last"), trust=True)
    first_run = before.step, losses("val_loss")[-1]
    train.main(["--resume", "out", "--max_steps", "60"])
    resumed = open_checkpoint(find_checkpoint("out", which="last"), trust=True)
    assert (first_run[0], resumed.step) == (40, 60)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 60"]  # steps 20 and 40 are not repeated
    # A fresh start would be far above.
    assert float(lines[0].partition("val_loss ")[2].split()[0]) < first_run[1] + 0.02
