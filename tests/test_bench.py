"""The benchmark runs, says what it measured, and leaves nothing behind; how fast anything is, is not asserted."""

import json
import math
import os

import pytest

import bench


def test_tax_measures_both_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["tax", "--rounds=1", "--steps=12", "--threads=1", "--json=tax.json"])
    assert os.listdir() == ["tax.json"]
    found = json.loads((tmp_path / "tax.json").read_text(encoding="utf-8"))
    assert (found["benchmark"], found["rounds"], found["steps"]) == ("tax", 1, 12)
    assert found["machine"].keys() >= {"hardware", "cores", "threads", "torch", "lightning", "python"}
    assert list(found["paths"]) == ["loop", "trainer"]
    for path in found["paths"].values():
        assert len(path["ms_per_step"]) == 1
        assert all(math.isfinite(path[name]) and path[name] > 0 for name in ("median", "min", "max"))
        assert path["last_loss"][0] < path["first_loss"][0] < 1.1 * math.log(65)
    ours, loop = (found["paths"][name]["median"] for name in ("trainer", "loop"))
    assert found["ratio"]["median"] == pytest.approx(ours / loop)
    table = capsys.readouterr().out
    assert table.startswith("path") and f"{found['ratio']['median']:.3f}" in table


@pytest.mark.parametrize(
    "argv, said",
    [
        (["speed"], "choose one of tax, parity"),
        (["tax", "--rounds=0"], "--rounds 0"),
        (["parity", "--strategies=zero"], "--strategy zero"),
        (["parity", "--devices=3"], "--devices 3"),
        (["tax", "--json=nowhere/tax.json"], "--json nowhere/tax.json"),
    ],
)
def test_a_mistake_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
