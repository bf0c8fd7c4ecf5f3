"""Benchmarks run, report their measurements, and leave no files. No test asserts a speed."""

import importlib.util
import json
import math
import os

import pytest

import bench
from lightning_gpt.bench import generate as generation_speed
from lightning_gpt.bench.prepare import PREPARE, TIKTOKEN, PrepareSpeed
from lightning_gpt.bench.tax import LOOP, TRAINER, Tax, Timing
from lightning_gpt.models import GPTModule
from nanogpt.model import GPT

MACHINE = {"hardware": "a CPU", "cores": 2, "threads": 1, "torch": "2", "lightning": "2", "python": "3"}


def test_tax_times_the_steps_of_both_paths(tmp_path, monkeypatch, capsys, takes):
    takes(GPT, "forward", 2)
    takes(GPTModule, "training_step", 1)
    for name in ("setup", "on_validation_epoch_start", "on_save_checkpoint"):
        takes(GPTModule, name, 1000)
    monkeypatch.chdir(tmp_path)
    bench.main(["tax", "--rounds=1", "--steps=12", "--threads=1", "--json=tax.json"])
    assert os.listdir() == ["tax.json"]
    found = json.loads((tmp_path / "tax.json").read_text(encoding="utf-8"))
    assert (found["benchmark"], found["rounds"], found["steps"]) == ("tax", 1, 12)
    assert found["machine"].keys() >= MACHINE.keys()
    assert {name: path["ms_per_step"] for name, path in found["paths"].items()} == {
        "loop": [2000],
        "trainer": [3000],
    }
    assert found["ratio"] == {"median": 1.5, "min": 1.5, "max": 1.5, "rounds": [1.5]}
    for path in found["paths"].values():
        assert path["last_loss"][0] < path["first_loss"][0] < 1.1 * math.log(65)
    table = capsys.readouterr().out
    assert table.startswith("path") and "1.500" in table


def test_tax_ratios_are_computed_per_round():
    tax = Tax(3, 100, {LOOP: Timing([10, 20, 40]), TRAINER: Timing([12, 18, 44])}, {}, MACHINE)
    assert tax.ratios == pytest.approx([1.2, 0.9, 1.1])
    [line] = [line for line in tax.table().splitlines() if line.startswith("ratio")]
    assert line.split() == ["ratio", "1.100", "0.900", "1.200"]


def test_prepare_ratios_are_computed_per_round():
    speeds = {PREPARE: [10.0, 30.0, 22.0], TIKTOKEN: [20.0, 20.0, 20.0]}
    speed = PrepareSpeed(1.0, 2, speeds, MACHINE | {"tiktoken": "0"})
    assert speed.ratios == pytest.approx([0.5, 1.5, 1.1])
    [line] = [line for line in speed.table().splitlines() if line.startswith("ratio")]
    assert line.split() == ["ratio", "1.100", "0.500", "1.500"]


@pytest.mark.usefixtures("gpt2_tables")
def test_prepare_measures_both_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 1000, encoding="ascii")
    bench.main(["prepare", "--rounds=2", "--megabytes=1", "--data=text.txt", "--json=speed.json"])
    assert sorted(os.listdir()) == ["speed.json", "text.txt"]
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert (found["benchmark"], found["megabytes"]) == ("prepare", pytest.approx(1, rel=0.02))
    for path in (PREPARE, TIKTOKEN):
        assert len(found[path]["rounds"]) == 2 and min(found[path]["rounds"]) > 0
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
    assert table.startswith("shape") and table.count("%") == 4 and "NOT" not in table


def test_generate_compares_moderngpt_with_its_hugging_face_counterpart(monkeypatch, capsys):
    pytest.importorskip("transformers")
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 11}
    monkeypatch.setitem(generation_speed.SHAPES, "small", generation_speed.Shape(tiny, prompt=5, new=4))
    monkeypatch.setattr(generation_speed, "READ_BYTES", 2**20)
    bench.main("generate --shapes=small --batch_sizes=2 --implementation=moderngpt --rounds=1".split())
    table = capsys.readouterr().out
    assert "transformers" in table and "NOT" not in table


@pytest.mark.parametrize(
    "argv, mentions",
    [
        (["speed"], "choose one of tax, parity, prepare, generate"),
        (["tax", "--rounds=0"], "--rounds 0"),
        (["parity", "--strategies=zero"], "--strategy zero"),
        (["parity", "--devices=3"], ["--devices 3", "give 1, 2, 4"]),
        (["prepare", "--megabytes=0"], "--megabytes 0"),
        (["prepare", "--data=nowhere.txt"], "--data nowhere.txt"),
        (["generate", "--shapes=large"], ["--shapes large", "small, 124m"]),
        (["generate", "--batch_sizes=1,x"], "--batch_sizes 1,x"),
        (["generate", "--rounds=0"], "--rounds 0"),
        (["tax", "--json=nowhere/tax.json"], "--json nowhere/tax.json"),
    ],
)
def test_wrong_options_are_refused(argv, mentions, refused):
    refused(bench.main, *argv, mentions=mentions)


@pytest.mark.parametrize(
    "content, mentions", [(b"", ["--data text.txt", "empty"]), (b"ab\xff", ["--data text.txt", "byte 2"])]
)
def test_prepare_refuses_files_that_are_not_text(content, mentions, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(content)
    refused(bench.main, "prepare", "--data=text.txt", mentions=mentions)
