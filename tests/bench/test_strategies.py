"""bench.py strategies, with tiny models on the CPU. No test asserts a speed."""

import csv
import sys

import pytest

import bench
from tests.launching import REPO, run_python


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_every_combination_is_a_row_also_one_that_does_not_fit(tmp_path):
    flags = "--sizes=1/1/8/20,1/1/8/900000 --strategies=auto --devices=1 --recompute=on --steps=2 --batch_size=1"
    flags += " --block_size=32 --memory_gib=0.01 --accelerator=cpu"
    done = run_python(REPO / "bench.py", "strategies", *flags.split(), "--csv=rows.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        small, large = csv.DictReader(file)
    assert (small["status"], large["status"]) == ("ok", "out of memory")
    assert int(small["parameters"]) < 2000 and int(large["parameters"]) > 8 * 900_000
    seconds = float(small["seconds_per_iteration"])
    assert float(small["tokens_per_second"]) == pytest.approx(32 / seconds, rel=0.2)
    assert 0 < float(small["peak_mib_per_gpu"]) < 0.01 * 1024 < float(large["planned_mib_per_gpu"])
    assert int(small["largest_batch_per_gpu"]) > 1 and large["largest_batch_per_gpu"] == large["peak_mib_per_gpu"] == ""
    assert small["activation_checkpointing"] == "1" and small["command"].startswith("bench.py strategies --sizes=1/1/8")
    assert len(done.stdout.splitlines()) == 3 and "out of memory" in done.stdout


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--sizes=7m"], ["--sizes 7m", "124m", "LAYERS/HEADS/WIDTH"]),
        (["--strategies=zero"], ["--strategy zero", "deepspeed_stage_3"]),
        (["--recompute=maybe"], ["--recompute maybe", "both"]),
        (["--minutes=0"], ["--minutes 0"]),
        (["--steps=0"], ["--steps 0"]),
        (["--csv=nowhere/rows.csv"], ["--csv nowhere/rows.csv"]),
    ],
)
def test_wrong_options_are_refused(flags, mentions, refused):
    refused(bench.main, "strategies", "--accelerator=cpu", *flags, mentions=mentions)
