"""--log_samples: texts and gradient norms at intervals, which do not change the run."""

import csv
import math
from pathlib import Path

import pytest
import torch

import train
from tests.launching import run_calls

FLAGS = [
    *"--max_steps=4 --eval_interval=4 --log_every_n_steps=1 --sample_tokens=12 --logger=csv".split(),
    "--n_layer=2",
]


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Return the logged values by step."""
    [file] = run.glob("logs/*/metrics.csv")
    found: dict[int, dict[str, float]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(int(row["step"]), {}).update({name: float(value) for name, value in row.items() if value})
    return found


def require_norms_that_add_up(run: Path) -> None:
    logged = metrics(run)
    names = {step: sorted(name for name in row if name.startswith("grad_norm/")) for step, row in logged.items()}
    expected = [f"grad_norm/{name}" for name in ("rest", "transformer.h.0", "transformer.h.1")]
    assert names == {1: [], 2: expected, 3: [], 4: expected}
    for step in (2, 4):
        row = logged[step]
        assert math.hypot(*(row[name] for name in expected)) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_samples_and_norms_are_logged_and_change_nothing(tiny_flags, text_file, tmp_path, capsys):
    flags = [*tiny_flags, *FLAGS, f"--data={text_file}", "--dropout=0.1", "--grad_accum=2"]
    train.main([*flags, f"--out_dir={tmp_path / 'plain'}"])
    capsys.readouterr()
    train.main([*flags, f"--out_dir={tmp_path / 'run'}", "--log_samples=2", "--logger=csv,tensorboard"])
    final = capsys.readouterr().out.partition("--- sample ---\n")[2].partition("\n--------------")[0]
    require_norms_that_add_up(tmp_path / "run")
    texts = {int(path.stem): path.read_text() for path in (tmp_path / "run" / "samples").iterdir()}
    assert sorted(texts) == [2, 4] and len(texts[2]) == len("\n") + 12 and texts[4] == final
    weights = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("plain", "run")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [folder] = (tmp_path / "run" / "logs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")}
    assert {step: text.replace("\n    ", "\n").removeprefix("    ") for step, text in shown.items()} == texts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_2"])
def test_samples_on_two_ranks(strategy, tiny_flags, text_file, tmp_path):
    own = [*tiny_flags, *FLAGS, f"--data={text_file}", f"--strategy={strategy}", "--devices=2", "--log_samples=2"]
    result = run_calls(["train", *own, f"--out_dir={tmp_path / 'run'}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["2.txt", "4.txt"]
    if strategy.startswith("deepspeed"):
        assert not any(name.startswith("grad_norm/") for row in metrics(tmp_path / "run").values() for name in row)
    else:
        require_norms_that_add_up(tmp_path / "run")


@pytest.mark.slow
def test_fsdp_in_bf16_trains_validates_saves_and_samples(tiny_flags, text_file, tmp_path):
    """The whole command under the README's row, with models whose caches and masks differ from nanogpt's."""
    own = [*tiny_flags, *FLAGS, f"--data={text_file}", "--strategy=fsdp", "--devices=2", "--precision=bf16"]
    models = ("mingpt", "moderngpt", "nanogpt")
    calls = [["train", *own, f"--implementation={name}", f"--out_dir={tmp_path / name}"] for name in models]
    calls += [["train", f"--resume={tmp_path / name}", "--max_steps=6"] for name in models]
    result = run_calls(*calls, ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--- sample ---") == 6 and result.stdout.count("step 6: train_loss") == 3


def test_samples_that_cannot_be_written_are_refused(tiny_flags, text_file, refused):
    flags = [*tiny_flags, f"--data={text_file}", "--log_samples=2", "--sample_tokens=0"]
    refused(train.main, *flags, mentions=["--log_samples 2", "--sample_tokens"])
