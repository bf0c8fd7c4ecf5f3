"""A short form of bench.py reliability: everything is broken a few times, and nothing may be lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench

REPO = Path(__file__).parents[2]
SHORT = "--kills=4 --rank_kills=2 --files=160 --steps=100 --corpus_gb=0.01".split()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run the benchmark in a process of its own, because forks need one that has not started torch's threads."""
    file = tmp_path_factory.mktemp("reliability") / "result.json"
    command = [sys.executable, "bench.py", "reliability", *SHORT, "--strategies=single", f"--json={file}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_kills_lose_at_most_one_save_interval(measured):
    from lightning_gpt.bench.kills import SAVE_INTERVAL

    (single,) = measured[0]["kills"]
    assert single["kills"] == len(single["lost"]) == 4 and single["runs"] > 0
    assert single["unreadable"] == 0 and single["difference"] == 0 and max(single["lost"]) <= SAVE_INTERVAL


@pytest.mark.slow
def test_mutated_files_load_or_are_refused(measured):
    for form in measured[0]["files"]:
        assert set(form["outcomes"]) <= {"loaded", "refused"}, form
        assert sum(form["outcomes"].values()) >= 9 and form["largest_bytes"] < 2**31
    assert sum(form["outcomes"].get("refused", 0) for form in measured[0]["files"]) > 40


@pytest.mark.slow
@pytest.mark.parametrize("part", ["signals", "disk"])
def test_faults_leave_a_checkpoint_and_the_promised_exit_code(measured, part):
    faults = measured[0][part]
    if part == "disk" and not faults:
        pytest.skip("mounting a small disk is not permitted here")
    assert len(faults) == {"signals": 4, "disk": 2}[part]
    assert [fault for fault in faults if not fault["passed"]] == []


@pytest.mark.slow
def test_long_run_is_watched_and_printed(measured):
    result, printed = measured
    (run,) = result["endurance"]
    assert run["steps"] == 100 and len(run["readings"]) == 20 and run["readings"][-1][0] == 100
    assert "100 steps on" in printed and "descriptors" in printed


def test_unknown_part_is_refused(refused):
    refused(bench.main, "reliability", "--parts=kills,floods", mentions=["--parts floods", "signals"])
