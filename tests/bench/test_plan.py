"""``bench.py plan``: plans beside published measurements."""

import csv
import re
from pathlib import Path

import pytest

import bench
from lightning_gpt.app.comparison import read_all
from lightning_gpt.bench.plan import SETTINGS, read_settings
from lightning_gpt.strategies.memory import Zero
from lightning_gpt.strategies.step import Moment, StepTrace

MEASURED = SETTINGS.with_suffix(".csv")


def _some_rows(tmp_path: Path, **own: str) -> Path:
    """Write the rows of two layers without recomputation to a file, with further columns."""
    with MEASURED.open(newline="") as file:
        rows = [
            row | own for row in csv.DictReader(file) if (row["n_layer"], row["activation_checkpointing"]) == ("2", "0")
        ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_peaks_of_2021_are_planned_within_15_percent(tmp_path, capsys):
    planned = tmp_path / "rows_planned.csv"
    bench.main(["plan", "--against", str(_some_rows(tmp_path)), "--csv", str(planned)])
    *rows, peaks, batches, times = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 5
    assert times.startswith("time: ") and times.count("5 of 5 within 25%") == 1
    assert all(len(row) <= 120 for row in rows)
    assert peaks.startswith("peak: 5 of 5 within 15%") and re.search(r"largest batch: \d of 5 within 15%", batches)
    measured, problems = read_all(tmp_path)
    peaks = {(m.source, m.strategy): m.peak_gib for m in measured}
    assert problems == [] and len(peaks) == 10
    assert peaks["rows, planned", "ddp"] != peaks["rows", "ddp"]
    assert peaks["rows, planned", "ddp"] == pytest.approx(peaks["rows", "ddp"], rel=0.15)


@pytest.mark.slow
def test_peaks_of_offloaded_models_of_2021_are_planned_within_20_percent(capsys):
    bench.main(["plan", "--against", str(SETTINGS.with_name("offload_8xa100_2021.csv"))])
    lines = capsys.readouterr().out.splitlines()
    deviations = [float(line.split()[-1].rstrip("%")) for line in lines if "deepspeed_stage_3_offload" in line]
    assert len(deviations) == 6 and all(abs(deviation) < 20 for deviation in deviations), deviations
    assert "largest batch: nothing measured" in lines


def test_a_row_overrides_the_settings(tmp_path, capsys):
    bench.main(["plan", "--against", str(_some_rows(tmp_path, n_embd="768", n_head="12", peak_mib_per_gpu=""))])
    printed = capsys.readouterr().out
    assert "peak: nothing measured" in printed
    ddp = next(line for line in printed.splitlines() if " ddp " in line)
    assert 300 < float(ddp.split()[3].replace(",", "")) < 6000 / 8, "a quarter of the width has a 16th of the weights"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer\n2\n", "activation_checkpointing|strategy"),
        ("n_layer,strategy,activation_checkpointing\n2,zero,0\n", "row 1: strategy zero is unknown"),
        ("n_layer,strategy,activation_checkpointing\n-2,ddp,0\n", "row 1: n_layer is -2"),
        ("n_layer,strategy,activation_checkpointing\n2,ddp,yes\n", "row 1: activation_checkpointing is yes"),
    ],
)
def test_wrong_rows_are_one_line(text, message, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(SystemExit) as stop:
        bench.main(["plan", "--against", str(tmp_path / "rows.csv")])
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


RATES = ["{memory_gib: 1, card: abacus}", "{memory_gib: 1, rates: {step: fast}}", "{memory_gib: 1, rates: {luck: 1}}"]


@pytest.mark.parametrize("text", ["colour: red", "memory_gib: much", "strategies: {ddp: {bucket: 1}}", "[]", *RATES])
def test_wrong_settings_are_refused(text, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape("--settings")):
        read_settings(tmp_path / "settings.yaml")


def test_stage_3_gathers_at_most_half_of_the_reuse_distance():
    trace = StepTrace(
        parameters=(1000,) * 100,
        units=(),
        forward=(Moment(0),),
        backward=(Moment(0),),
        accumulate=1,
        weight_bytes=2,
        compute_bytes=2,
        state=0,
        step=0,
    )
    near, far = (
        Zero(stage=3, persistent=1, prefetch=0, reuse=reuse).memory(trace, ranks=2).buffers for reuse in (20_000, 10**9)
    )
    assert far - near == 2 * (100_000 - 10_000)
