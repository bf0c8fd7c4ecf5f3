"""Whole numbers on the command line and in YAML files, and keys that a file gives twice."""

import pytest

import train
from lightning_gpt.cli import parse_train


def test_whole_numbers_with_exponents_and_suffixes(tiny_flags, tmp_path):
    for text in ("1e6", "1M", "1_000_000", "1000K", "1.0m", "0.001B", "1000000"):
        flags = [f for f in tiny_flags if not f.startswith("--max")]
        assert parse_train([*flags, f"--max_tokens={text}"]).trainer.max_tokens == 10**6
        file = tmp_path / "config.yaml"
        file.write_text(f"max_tokens: {text}\nbatch_size: 1e1\n")
        config = parse_train(["--config", str(file), "--seed=2K", "--warmup_steps", "1.5K"])
        assert (config.trainer.max_tokens, config.data.batch_size) == (10**6, 10)
        assert (config.run.seed, config.optim.warmup_steps) == (2000, 1500)


@pytest.mark.parametrize("value", ["1.5", "1M5", "M", "1e-3", "0.5", "true", "1e30", "9" * 50, "3/1"])
def test_other_numbers_are_refused(refused, tiny_flags, tmp_path, value):
    line = refused(train.main, *tiny_flags, f"--max_steps={value}", mentions=["--max_steps", value[:40]])
    assert "1M" in line or "2^63" in line
    file = tmp_path / "config.yaml"
    file.write_text(f"max_steps: {value}\n")
    mentions = "line 1: an integer of 167 bits; give one below 2^63" if value == "9" * 50 else "--max_steps"
    refused(train.main, *tiny_flags, "--config", file, mentions=mentions)


def test_key_given_twice_is_refused(refused, tiny_flags, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("max_steps: 5\nseed: 1\nmax_steps: 6\n")
    mentions = [f"--config {file}, line 3", "max_steps is given twice", "line 1"]
    refused(train.main, *tiny_flags, "--config", file, mentions=mentions)
    file.write_text("max_steps: 5\ntrainer:\n  detect_anomaly: true\n  detect_anomaly: false\n")
    refused(train.main, *tiny_flags, "--config", file, mentions=["line 4", "detect_anomaly is given twice"])
