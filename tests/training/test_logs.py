"""The logs of a run that is resumed: one set of curves, as those of an uninterrupted run."""

import csv

import pytest

import train
from tests.launching import run_calls

FLAGS = "--max_steps=8 --eval_interval=2 --eval_batches=2 --log_every_n_steps=1 --keep=9 --sample_tokens=0".split()
TIMES = {"step_time_ms", "tokens_per_second", "peak_memory_mib"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_flags, text_file):
    """Return the folders of an uninterrupted run, and of one that was resumed from an older checkpoint; read-only."""
    folder = tmp_path_factory.mktemp("logs")
    flags = [*tiny_flags, *FLAGS, f"--data={text_file}", "--logger=tensorboard,csv"]
    train.main([*flags, f"--out_dir={folder / 'whole'}"])
    train.main([*flags, f"--out_dir={folder / 'parts'}", "--max_steps=7", "--lr_decay_steps=8"])
    file = next((folder / "parts").glob("logs/*/metrics.csv"))
    file.write_bytes(file.read_bytes()[:-5])  # killed in the middle of a row
    train.main([f"--resume={folder / 'parts' / 'checkpoints' / 'step-000004.ckpt'}", "--max_steps=8"])
    return folder / "whole", folder / "parts"


def rows_of(run):
    [file] = run.glob("logs/*/metrics.csv")
    with file.open(newline="") as lines:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(lines)]


def test_csv_has_the_rows_of_an_uninterrupted_run(runs):
    whole, parts = map(rows_of, runs)
    assert parts == whole and [row["step"] for row in whole if row["train_loss"]] == list("12345678")
    assert [row["step"] for row in whole if row["val_loss"]] == list("2468")


def test_tensorboard_shows_the_points_of_an_uninterrupted_run(runs):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = []
    for run in runs:
        [folder] = (run / "logs").iterdir()
        events = accumulator.EventAccumulator(str(folder)).Reload()
        seen.append({name: [(e.step, e.value) for e in events.Scalars(name)] for name in ("train_loss", "val_loss")})
    assert seen[0] == seen[1] and [step for step, _ in seen[0]["val_loss"]] == [2, 4, 6, 8]


def test_csv_is_written_before_a_checkpoint(runs, tmp_path, tiny_flags, text_file, monkeypatch):
    """A run that dies at any later moment has logged all steps up to its checkpoint."""
    from lightning.pytorch.loggers import CSVLogger

    monkeypatch.setattr(CSVLogger, "finalize", lambda *_: None)
    flags = [*tiny_flags, f"--data={text_file}", "--log_every_n_steps=1", "--logger=csv", "--sample_tokens=0"]
    train.main([*flags, f"--out_dir={tmp_path / 'run'}"])
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["train_loss"]] == list("1234")


def test_mlflow_and_wandb_continue_their_runs(tmp_path, tiny_flags, text_file, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs requirements/loggers.txt")
    pytest.importorskip("wandb", reason="needs requirements/loggers.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--data={text_file}", "--log_every_n_steps=1", "--sample_tokens=8", f"--out_dir={run}"]
    own = ["--max_steps=2", "--log_samples=2", "--logger=mlflow,wandb", "--tags=a,b", "--run_name=first"]
    for call in ([*flags, *own], [f"--resume={run}", "--max_steps=4"]):
        result = run_calls(["train", *call])
        assert result.returncode == 0, result.stderr
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    [logged] = client.search_runs([client.get_experiment_by_name("lightning-gpt").experiment_id])
    losses = client.get_metric_history(logged.info.run_id, "train_loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert logged.info.run_name == "first" and {"a", "b"} <= logged.data.tags.keys()
    assert [file.path for file in client.list_artifacts(logged.info.run_id, "samples")] == [
        "samples/2.txt",
        "samples/4.txt",
    ]
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
