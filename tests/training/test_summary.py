"""run.json: what it says of a run, and that its curves go on where a resumed run does."""

import json
import re
from pathlib import Path

import lightning
import pytest
import torch

import train
from lightning_gpt import parse_train
from lightning_gpt.training.run import train as train_config


def summary(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def flags(tiny_flags, text_file) -> list[str]:
    return [*tiny_flags, f"--data={text_file}", "--sample_tokens=0", "--log_every_n_steps=1", "--max_steps=6"]


class Crash(lightning.Callback):
    """Fail before the fourth step, after looking at run.json."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            self.seen = summary(self.run)
            raise RuntimeError("crash")


def test_curves_of_a_crashed_and_resumed_run_are_those_of_one_run(flags, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, f"--out_dir={whole}"])
    printed = re.findall(r"step (\d): train_loss ([\d.]+), val_loss ([\d.]+)", capsys.readouterr().out)
    expected = summary(whole)
    assert expected["status"] == "finished" and expected["step"] == expected["max_steps"] == 6
    assert expected["tokens"] == 6 * 4 * 16 and expected["tokens_per_step"] == 64
    train_curve, validation = expected["curves"]["train"], expected["curves"]["validation"]
    assert train_curve["step"] == [1, 2, 3, 4, 5, 6] and validation["step"] == [2, 4, 6]
    assert validation["loss"] == pytest.approx([float(loss) for _, _, loss in printed], abs=1e-4)
    assert train_curve["loss"][1::2] == pytest.approx([float(loss) for _, loss, _ in printed], abs=1e-4)
    assert train_curve["seconds"] == sorted(train_curve["seconds"]) and expected["seconds"] > 0
    assert expected["val_loss"] == validation["loss"][-1] and expected["best_val_loss"] == min(validation["loss"])
    weights = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert expected["parameters"] == sum(weight.numel() for weight in weights.values())

    crash = Crash(parts)
    with pytest.raises(RuntimeError, match="crash"):
        train_config(parse_train([*flags, f"--out_dir={parts}"]), callbacks=[crash])
    assert crash.seen["status"] == "running" and crash.seen["curves"]["validation"]["step"] == [2]
    failed = summary(parts)
    assert failed["status"] == "failed" and failed["curves"]["train"]["step"] == [1, 2, 3]
    train.main([f"--resume={parts}"])
    resumed = summary(parts)
    assert (resumed["status"], resumed["sessions"], resumed["started"]) == ("finished", 2, failed["started"])
    for name, curve in expected["curves"].items():
        assert {**curve, "seconds": None} == {**resumed["curves"][name], "seconds": None}
    seconds = resumed["curves"]["train"]["seconds"]
    assert seconds == sorted(seconds) and resumed["tokens"] == expected["tokens"]


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 1, "step": 4, "seconds": 1, "curves": {"train": 3}}'])
def test_damaged_file_costs_only_the_earlier_curves(text, flags, tmp_path):
    run = tmp_path / "run"
    train.main([*flags, f"--out_dir={run}", "--max_steps=2"])
    (run / "run.json").write_text(text)
    train.main([f"--resume={run}", "--max_steps=4"])
    assert summary(run)["curves"]["train"]["step"] == [3, 4]


def test_unwritable_file_costs_a_warning(flags, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "run.json").mkdir(parents=True)
    train.main([*flags, f"--out_dir={run}"])
    assert capsys.readouterr().err.count("run.json cannot be written") == 1
    assert (run / "checkpoints" / "last.ckpt").exists()


def test_chart_is_drawn_of_runs_that_log(flags, tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    train.main([*flags, f"--out_dir={run}", "--max_steps=2"])
    assert not (run / "loss.png").exists()  # --logger none
    train.main([f"--resume={run}", "--max_steps=4", "--logger=csv"])
    first = (run / "loss.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    train.main([f"--resume={run}", "--max_steps=6", "--logger=csv"])
    assert (run / "loss.png").read_bytes() != first
