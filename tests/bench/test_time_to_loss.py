"""bench.py time_to_loss: runs equal train.py's, only training is timed, and each seed has its own time to target."""

import json
import sys
from pathlib import Path

import pytest

import bench
import evaluate
import train
from lightning_gpt.bench import time_to_loss
from lightning_gpt.bench.curves import Curve, TimeToLoss, Trained
from lightning_gpt.bench.time_to_loss import RECIPES, Recipe, Row
from lightning_gpt.cli import parse_train
from lightning_gpt.models import GPTModule

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = [(recipe, name) for recipe in RECIPES for name in RECIPES[recipe].rows]
TINY = "--accelerator=cpu --implementation=nanogpt --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4"
MACHINE = {"hardware": "a CPU", "cores": 2, "threads": 1, "torch": "2", "lightning": "2", "python": "3"}


@pytest.fixture
def tiny_rows(monkeypatch):
    """Replace the CPU recipe by two rows; "fast" has half as many steps and validates twice as often."""
    rows = {"slow": Row("--learning_rate=1e-4", 80, 20), "fast": Row("--learning_rate=1e-2", 40, 10)}
    monkeypatch.setitem(RECIPES, "cpu", Recipe(TINY, "cpu", rows))


def _result(rows, *, goal=None) -> TimeToLoss:
    curves = {name: Trained([], [Curve(seed, *run) for seed, run in enumerate(runs)]) for name, runs in rows.items()}
    return TimeToLoss("python bench.py time_to_loss", "cpu", goal, 99, MACHINE, curves)


@pytest.mark.usefixtures("tiny_rows")
def test_run_equals_train_py(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = ["--json=found.json", "--plot=found.png"]
    bench.main(["time_to_loss", f"--data={text_file}", "--steps=8", "--seeds=2", "--threads=1", *files])
    output = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.png"]
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    slow, fast = (found["rows"][name]["curves"] for name in ("slow", "fast"))
    assert [(c["seed"], c["steps"]) for c in slow] == [(1337, [2, 4, 6, 8]), (1338, [2, 4, 6, 8])]
    assert [(c["seed"], c["steps"]) for c in fast] == [(1337, [1, 2, 3, 4]), (1338, [1, 2, 3, 4])]
    for curve in slow + fast:
        assert 0 < curve["seconds"][0] and curve["seconds"] == sorted(curve["seconds"])
    assert found["target"] == pytest.approx((slow[0]["losses"][-1] + slow[1]["losses"][-1]) / 2)
    assert found["machine"].keys() >= {"hardware", "threads", "torch"} and "--steps 8" in found["command"]
    assert output.out.startswith("row") and f"steps to {found['target']:.3f}" in output.out
    turns = [line.partition(":")[0] for line in output.err.splitlines() if "seed" in line]
    assert turns == [f"{name}, seed {seed}" for seed in (1337, 1338) for name in ("slow", "fast")]

    # Repeat one run with train.py, and score it with evaluate.py, which uses another batch size.
    alone = [*TINY.split(), "--learning_rate=1e-4", "--max_steps=8", "--seed=1338", f"--data={text_file}"]
    train.main([*alone, "--out_dir=alone", "--logger=none", "--sample_tokens=0"])
    evaluate.main(["--checkpoint=alone", "--which=last", "--accelerator=cpu", "--json=score.json"])
    score = json.loads(Path("score.json").read_text(encoding="utf-8"))
    assert slow[1]["losses"][-1] == pytest.approx(score["loss"], abs=1e-5)
    assert found["val_tokens"] == score["tokens"]

    capsys.readouterr()
    bench.main(["time_to_loss", "--from=found.json", "--plot=again.png"])
    assert capsys.readouterr().out == output.out
    for picture in ("found.png", "again.png"):
        content = Path(picture).read_bytes()
        assert content.startswith(b"\x89PNG\r\n") and len(content) < 100_000


@pytest.mark.usefixtures("tiny_rows")
def test_only_training_is_timed(text_file, tmp_path, takes):
    takes(GPTModule, "training_step", 3)
    for name in ("setup", "on_validation_epoch_start", "on_validation_epoch_end", "on_save_checkpoint"):
        takes(GPTModule, name, 1000)
    out = tmp_path / "found.json"
    bench.main(["time_to_loss", f"--data={text_file}", "--rows=slow", "--steps=8", "--seeds=1", f"--json={out}"])
    [curve] = json.loads(out.read_text(encoding="utf-8"))["rows"]["slow"]["curves"]
    assert (curve["steps"], curve["seconds"]) == ([2, 4, 6, 8], [6, 12, 18, 24])


def test_target_is_reached_at_the_first_validation_below_it():
    first = [([10, 20], [1.0, 2.0], [3.0, 2.0]), ([10, 20], [2.0, 4.0], [2.0, 2.2])]
    other = [([5, 10, 15], [0.5, 1.0, 1.5], [2.2, 2.1, 1.0]), ([5, 10, 15], [0.5, 1.0, 1.5], [2.3, 2.11, 2.2])]
    found = _result({"first": first, "other": other})
    assert found.target == pytest.approx(2.1)  # the mean of 2.0 and 2.2
    assert found.reached("first") == [(20, 2.0), (20, 4.0)]  # at its end, by definition
    assert found.reached("other") == [(10, 1.0), None]
    summary = found.summary("other")
    assert summary["seeds_that_reached"] == 1 and summary["last_loss"]["mean"] == pytest.approx(1.6)
    assert summary["steps_ratio"]["mean"] == 0.5 and summary["seconds_ratio"]["mean"] == 0.5
    assert (summary["ms_per_step"]["min"], summary["ms_per_step"]["max"]) == (pytest.approx(100), pytest.approx(100))
    assert "other: 1 of 2 seeds reached 2.100" in found.table()


def test_ratios_are_computed_per_seed():
    first = [([20], [2.0], [2.0]), ([20], [4.0], [2.0])]
    other = [([10], [1.0], [1.9]), ([10], [3.0], [1.9])]
    ratio = _result({"first": first, "other": other}).summary("other")["seconds_ratio"]
    assert ratio == {"mean": 0.625, "median": 0.625, "min": 0.5, "max": 0.75}


def test_fixed_goal_is_reached_or_not():
    first = [([10, 20, 30], [1.0, 2.0, 3.0], [1.6, 1.46, 1.5])]  # overfits
    found = _result({"first": first, "late": [([10], [1.0], [1.5])], "soon": [([4], [0.5], [1.47])]}, goal=1.47)
    assert [found.reached(name) for name in found.rows] == [[(20, 2.0)], [None], [(4, 0.5)]]
    assert found.summary("soon")["seconds_ratio"]["mean"] == 0.25
    assert found.summary("late")["seconds_ratio"] is None
    line = next(line for line in found.table().splitlines() if line.startswith("late"))
    assert line.split()[1:] == ["1.500", "-", "-", "-", "-", "100.0"]


@pytest.mark.parametrize("recipe, name", ROWS)
def test_rows_parse_with_the_sizes_of_the_recipe(recipe, name):
    settings = RECIPES[recipe]
    config = parse_train([*settings.flags.split(), *settings.rows[name].flags.split()])
    yaml = {"cpu": "shakespeare_char_cpu.yaml", "gpu": "train_shakespeare_char.yaml"}[recipe]
    known = parse_train([f"--config={CONFIGS / yaml}"])
    sizes = ("n_layer", "n_head", "n_embd")
    assert [config.model_fields[size] for size in sizes] == [known.model_fields[size] for size in sizes]
    assert (config.model.block_size, config.data.batch_size) == (known.model.block_size, known.data.batch_size)
    assert settings.rows[name].steps <= known.trainer.max_steps


@pytest.mark.parametrize("recipe, yaml", [("cpu", "shakespeare_char_cpu.yaml"), ("gpu", "train_shakespeare_char.yaml")])
def test_published_row_equals_the_recipe(recipe, yaml):
    settings = RECIPES[recipe]
    config = parse_train([*settings.flags.split(), *settings.rows["nanogpt-published"].flags.split()])
    rate = ["--learning_rate=1e-3", "--min_learning_rate=1e-4"]
    known = parse_train([f"--config={CONFIGS / yaml}", *rate])
    assert config.model == known.model and config.model_fields == known.model_fields and config.optim == known.optim
    assert settings.rows["nanogpt-published"].steps == known.trainer.max_steps


@pytest.mark.parametrize(
    "flags, mentions",
    [
        (["--recipe=tpu"], ["--recipe tpu", "choose one of cpu, gpu"]),
        (["--rows=nanogpt-adamw,gpt3"], ["--rows gpt3", "choose from nanogpt-published"]),
        (["--seeds=0"], "--seeds 0"),
        (["--steps=-1"], "--steps -1"),
        (["--threads=0"], "--threads 0"),
        (["--json=nowhere/found.json"], ["--json nowhere/found.json", "cannot be written"]),
        (["--plot=nowhere/found.png"], ["--plot nowhere/found.png", "cannot be written"]),
        (["--rows=nanogpt-published", "--data=nowhere.txt"], "--data nowhere.txt"),
        (["--from=nowhere.json"], "--from nowhere.json: No such file"),
        (["--from=README.md"], ["--from README.md", "not a result of time_to_loss"]),
        (["--from=other.json"], ["--from other.json", "not a result of time_to_loss"]),
    ],
)
def test_wrong_options_are_refused(flags, mentions, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no JSON", encoding="ascii")
    Path("other.json").write_text('{"benchmark": "tax", "rounds": 7}', encoding="ascii")
    refused(bench.main, "time_to_loss", *flags, mentions=mentions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other.json"]


def test_gpu_recipe_without_a_gpu_is_refused(refused):
    refused(
        bench.main, "time_to_loss", "--recipe=gpu", "--rows=nanogpt-published", mentions="--recipe gpu: needs a GPU"
    )


def test_plot_without_matplotlib_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(time_to_loss, "train_silently", None)
    line = refused(bench.main, "time_to_loss", f"--plot={tmp_path / 'x.png'}", mentions="--plot")
    assert "pip install -r requirements/bench.txt" in line
