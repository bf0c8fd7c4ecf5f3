"""bench.py gpu, tried on a CPU with small models."""

import json

import pytest

import bench


@pytest.mark.slow
def test_steps_run_and_are_recorded(tmp_path, capsys):
    file = tmp_path / "result.json"
    steps = ["numerics", "optimizers", "whole_fsdp", "speed_moderngpt", "decoding", "checkpoints"]
    bench.main(["gpu", "--accelerator=cpu", f"--steps={','.join(steps)}", f"--json={file}"])
    result = json.loads(file.read_text())
    assert list(result["seconds"]) == steps and {check["step"] for check in result["checks"]} == set(steps)
    judged = [check for check in result["checks"] if check["passed"] is not None]
    assert len(judged) >= 17 and [check for check in judged if not check["passed"]] == []
    table = capsys.readouterr().out
    assert table.startswith("| step | check ") and f"{len(judged)} of {len(judged)} checks passed" in table


def test_step_that_fails_or_is_late_is_a_failed_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'facts' in sys.argv: sys.exit('a message')\n")
    bench.main(["gpu", "--accelerator=cpu", "--steps=facts"])
    out = capsys.readouterr().out
    assert "exit code 1: SystemExit: a message |  | FAIL |" in out and "0 of 1 checks passed" in out


def test_bad_options_are_refused(refused):
    refused(bench.main, "gpu", mentions=["needs an NVIDIA GPU", "--accelerator cpu"])
    refused(bench.main, "gpu", "--steps=facts,dance", mentions=["--steps dance", "numerics"])
    refused(bench.main, "gpu", "--accelerator=tpu", mentions="--accelerator tpu")
