"""The benchmark runs, says what it measured, and leaves nothing behind; how fast anything is, is not asserted."""

import importlib.util
import json
import math
import os

import numpy as np
import pytest

import bench
from lightning_gpt.bench import generate as generation_speed
from lightning_gpt.config import UserError
from lightning_gpt.tokenizers import GPT2Tokenizer


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


def test_prepare_measures_both_paths(tmp_path, monkeypatch, capsys):
    try:
        GPT2Tokenizer().encode("a")
    except UserError as error:
        pytest.skip(f"GPT-2's tables cannot be loaded here: {error}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 1000, encoding="ascii")
    bench.main(["prepare", "--rounds=2", "--megabytes=1", "--data=text.txt", "--json=speed.json"])
    assert sorted(os.listdir()) == ["speed.json", "text.txt"]
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert (found["benchmark"], found["megabytes"]) == ("prepare", pytest.approx(1, rel=0.02))
    ours, theirs = (np.array(found[path]["rounds"]) for path in ("prepare.py", "tiktoken"))
    assert found["ratio"]["rounds"] == pytest.approx(ours / theirs) and len(ours) == 2
    assert f"{found['ratio']['median']:.3f}" in capsys.readouterr().out


def test_generate_measures_every_way(tmp_path, monkeypatch, capsys):
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 11}
    monkeypatch.setitem(generation_speed.SHAPES, "small", generation_speed.Shape(tiny, prompt=5, new=20))
    monkeypatch.setattr(generation_speed, "READ_BYTES", 2**20)
    flags = ["--shapes=small", "--batch_sizes=1,3", "--implementation=mingpt", "--rounds=2", "--recompute_steps=4"]
    flags.append("--compile=eager")
    bench.main(["generate", *flags, f"--json={tmp_path / 'speed.json'}"])
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [case["batch_size"] for case in found["cases"]] == [1, 3]
    ways = ["cached", "compiled", "recompute", *(["transformers"] if importlib.util.find_spec("transformers") else [])]
    for case in found["cases"]:
        assert list(case["seconds"]) == ways and all(len(s) == 2 and min(s) > 0 for s in case["seconds"].values())
        assert list(case["step_seconds"]) == list(case["floor_fraction"]) == list(case["gain"]) == ways[:2]
        for way in ways[:2]:
            assert len(case["step_seconds"][way]) == 2 and case["floor_fraction"][way] > 0
            assert case["gain"][way][way] == 1 and case["gain"][way]["recompute"] > 0
        assert case["same_tokens"] is True and case["compile_seconds"] > 0
        # Head, final norm, two blocks of 12 C^2 weights and 13 C biases and norms; 5 + 21 / 2 positions in the cache.
        weights = 11 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
        read = 4 * (weights + case["batch_size"] * 2 * 2 * 16 * 15.5)
        assert case["floor_seconds"] * max(case["gigabytes_per_second"]) * 1e9 == pytest.approx(read)
    table = capsys.readouterr().out
    assert table.startswith("shape") and table.count("of that speed") == 4 and "NOT" not in table


def test_generate_knows_the_counterpart_of_moderngpt(monkeypatch, capsys):
    pytest.importorskip("transformers")
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 11}
    monkeypatch.setitem(generation_speed.SHAPES, "small", generation_speed.Shape(tiny, prompt=5, new=4))
    monkeypatch.setattr(generation_speed, "READ_BYTES", 2**20)
    bench.main("generate --shapes=small --batch_sizes=2 --implementation=moderngpt --rounds=1".split())
    table = capsys.readouterr().out
    assert "transformers" in table and "NOT" not in table


@pytest.mark.parametrize(
    "argv, said",
    [
        (["speed"], "choose one of tax, parity, prepare, generate"),
        (["tax", "--rounds=0"], "--rounds 0"),
        (["parity", "--strategies=zero"], "--strategy zero"),
        (["parity", "--devices=3"], "--devices 3"),
        (["prepare", "--megabytes=0"], "--megabytes 0"),
        (["prepare", "--data=nowhere.txt"], "--data nowhere.txt"),
        (["generate", "--shapes=large"], "--shapes large is unknown; choose of small, 124m"),
        (["generate", "--batch_sizes=1,x"], "--batch_sizes 1,x"),
        (["generate", "--rounds=0"], "--rounds 0"),
        (["tax", "--json=nowhere/tax.json"], "--json nowhere/tax.json"),
    ],
)
def test_a_mistake_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
