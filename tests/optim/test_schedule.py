"""Learning rates at chosen steps, computed by hand, through train.py's own log."""

import csv
from pathlib import Path

import pytest

import train
from lightning_gpt.optim.schedule import scheduled

# Five steps of warm-up to 6, then 12 of the schedule's 20 steps, and a floor of 1.
RATES = {
    "cosine": {0: 1, 4: 5, 5: 6, 10: 1 + 5 * 0.75, 15: 1 + 5 * 0.25, 20: 1, 99: 1},
    "linear": {0: 1, 4: 5, 5: 6, 11: 4, 17: 2, 20: 1, 99: 1},
    "constant": {0: 1, 4: 5, 5: 6, 12: 6, 20: 6, 99: 6},
    "wsd": {0: 1, 4: 5, 5: 6, 15: 6, 16: 6, 18: 3.5, 19: 2.25, 20: 1, 99: 1},
}


@pytest.mark.parametrize("shape", RATES)
def test_rates_at_chosen_steps(shape: str) -> None:
    steps = {"constant": None}.get(shape, 20)
    for step, rate in RATES[shape].items():
        cooldown = 4 if shape == "wsd" else None
        settings = {"warmup_steps": 5, "decay_steps": steps, "cooldown_steps": cooldown, "final": 1 / 6}
        assert 6 * scheduled(step, shape=shape, **settings) == pytest.approx(rate)


TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --accelerator=cpu --sample_tokens=0".split()
RUN = [*TINY, "--eval_interval=10", "--eval_batches=1", "--log_every_n_steps=1", "--logger=csv", "--learning_rate=0.01"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh \n" * 100)
    return f"--data={path}"


def logged_rates(run: Path) -> list[float]:
    """Return the learning rate that the run logged after each step: that of the next one."""
    found = []
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        found += [float(row["learning_rate"]) for row in csv.DictReader(file.open()) if row.get("learning_rate")]
    return found


def test_wsd_run_has_the_planned_rates_and_resumes_with_them(tmp_path: Path, text: str, capsys) -> None:
    run = tmp_path / "run"
    schedule = ["--schedule=wsd", "--decay_fraction=0.5", "--warmup_steps=1", "--min_learning_rate=0"]
    train.main([*RUN, text, *schedule, f"--out_dir={run}", "--max_steps=4"])
    assert "schedule  wsd: 0.01 until step 2, then down to 0 at step 4" in capsys.readouterr().out
    assert logged_rates(run) == pytest.approx([0.01, 0.01, 0.005, 0.0])
    train.main([f"--resume={run}", "--max_steps=8"])  # the same fraction of the new budget
    assert logged_rates(run)[4:] == pytest.approx([0.0075, 0.005, 0.0025, 0.0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule=step"], "--schedule step is unknown; choose one of cosine, linear, constant, wsd"),
        (["--decay_fraction=0.1"], "--decay_fraction has no effect under --schedule cosine"),
        (["--schedule=constant", "--min_learning_rate=0"], "--min_learning_rate has no effect under --schedule consta"),
        (["--schedule=wsd", "--decay_fraction=2"], "from 0 to 1"),
    ],
)
def test_options_that_do_nothing_are_refused(refused, text: str, flags: list[str], message: str) -> None:
    refused(train.main, *RUN, text, *flags, "--max_steps=4", mentions=[message])
