"""Every mistake of a user gives one line on stderr and exit code 2, and leaves no file behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
import train

REPO = Path(__file__).parents[2]


@pytest.fixture
def refused(refused, tmp_path, monkeypatch):
    """Return a function that calls an entry point in an empty folder, and checks that it refuses and leaves no file."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(main, *flags, mentions=()):
        line = refused(main, *flags, mentions=mentions)
        assert list(folder.iterdir()) == [], "something was left behind"
        return line

    return call


@pytest.fixture
def refused_training(refused, tiny_flags, text_file):
    """Return a function like ``refused`` for train.py, with the flags of a tiny run."""

    def call(*flags, mentions=()):
        return refused(train.main, *tiny_flags, f"--data={text_file}", *flags, mentions=mentions)

    return call


NAMES = {
    "implementation": (["--implementation", "gpt5"], ["--implementation gpt5", "mingpt", "nanogpt"]),
    "implementation module": (["--implementation", "nowhere:GPT"], ["--implementation nowhere:GPT", "nowhere"]),
    "implementation class": (["--implementation", "json:GPT"], ["--implementation json:GPT", "no class GPT"]),
    "implementation config": (["--implementation", "json:JSONEncoder"], ["--implementation json:JSON", "vocab_size"]),
    "implementation parts": (["--implementation", ":GPT"], ["--implementation :GPT", "package.module:Class"]),
    "strategy": (["--strategy", "dpp"], ["--strategy dpp", "auto", "ddp"]),
    "accelerator": (["--accelerator", "abacus"], ["--accelerator abacus", "cpu", "gpu"]),
    "preset": (["--model_type", "gpt-huge"], ["--model_type gpt-huge", "gpt-micro", "gpt2-xl"]),
    "precision": (["--precision", "8"], ["--precision 8", "16", "bf16", "32"]),
    "logger": (["--logger", "csv,paper"], ["--logger paper", "tensorboard", "csv", "wandb", "mlflow", "none"]),
    "logger twice": (["--logger", "csv,csv"], ["--logger csv,csv", "csv twice"]),
    "optimizer": (["--optimizer", "sgd"], ["--optimizer sgd", "adamw", "muon"]),
    "tokenizer": (["--tokenizer", "word"], ["--tokenizer word", "char", "byte", "gpt2"]),
    "compile backend": (["--compile", "javac"], ["--compile javac", "inductor"]),
    "flag": (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
    "flag with =": (["--learning_rat=1"], ["--learning_rat", "did you mean --learning_rate?"]),
    "short flag": (["--lr", "1"], ["--lr", "did you mean --learning_rate?"]),
    "flag of Hugging Face": (["--logging_steps=9"], ["--logging_steps", "did you mean --log_every_n_steps?"]),
    "flag of Lightning": (["--default_root_dir=x"], ["--default_root_dir", "did you mean --out_dir?"]),
    "option that Lightning takes": (["--profiler=simple"], ["did you mean --trainer.profiler?"]),
    "flag of nobody": (["--lora_rank=4"], ["unknown flag --lora_rank; --help"]),
    "flag of another model": (["--implementation", "nanogpt", "--embd_pdrop", "0"], ["--embd_pdrop"]),
    "word": (["hello"], ["hello"]),
    "trainer option": (["--trainer.fast_dev_runn", "true"], ["--trainer.fast_dev_runn", "fast_dev_run"]),
    "trainer option of ours": (["--trainer.max_steps", "3"], ["--trainer.max_steps"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_unknown_name_is_refused(case, refused_training):
    flags, mentions = NAMES[case]
    refused_training(*flags, mentions=mentions)


VALUES = {
    "width and heads": (["--n_head=3"], ["n_embd", "n_head", "16", "3"]),
    "word for a number": (["--max_steps", "abc"], ["--max_steps", "abc"]),
    "word for a fraction": (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    "word for a switch": (["--implementation", "nanogpt", "--bias", "perhaps"], ["--bias", "perhaps"]),
    "no value": (["--batch_size"], ["--batch_size"]),
    "half precision": (["--precision", "16"], ["--precision 16", "bf16"]),
    "true half precision": (["--precision", "16-true"], ["--precision 16-true", "bf16"]),
    "flag of another optimizer": (["--muon_learning_rate=0.1"], ["--muon_learning_rate", "--optimizer muon"]),
    "two budgets": (["--max_tokens=9"], ["--max_steps", "--max_tokens"]),
    "prompt": (["--prompt", "cat\u00e9"], ["--prompt", "U+00E9"]),
    "empty prompt": (["--prompt", ""], ["--prompt"]),
    "dropout": (["--embd_pdrop=1.5"], ["dropout", "1.5"]),
    "gpus and cpu": (["--gpus", "1"], ["--gpus"]),
    "devices as a word": (["--devices", "many"], ["--devices many"]),
    "no devices": (["--devices", "0"], ["--devices 0"]),
    "trainer option in the place of ours": (["--trainer.limit_val_batches=0"], ["--trainer.limit_val_batches"]),
    "trainer value": (["--trainer.gradient_clip_algorithm", "scissors"], ["gradient_clip_algorithm", "scissors"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_wrong_value_is_refused(case, refused_training):
    flags, mentions = VALUES[case]
    refused_training(*flags, mentions=mentions)


NUMBERS = {
    "batch_size": (0, -1),
    "block_size": (0, -4),
    "n_layer": (0, -1),
    "n_head": (0,),
    "n_embd": (0, -16),
    "eval_interval": (0, -1),
    "eval_batches": (-1,),
    "log_every_n_steps": (0, -1),
    "accumulate_grad_batches": (0, -2),
    "num_workers": (-1,),
    "num_nodes": (0,),
    "devices": (0, -2),
    "learning_rate": (-1, 0, "nan", "inf"),
    "muon_learning_rate": (-1, 0),
    "min_learning_rate": (-1,),
    "warmup_steps": (-1,),
    "lr_decay_steps": (0, -1),
    "weight_decay": (-1,),
    "beta1": (1, -0.1),
    "beta2": (1.5,),
    "gradient_clip_val": (-1,),
    "sample_tokens": (-1,),
    "max_steps": (0, -1),
    "seed": (-1,),
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in NUMBERS.items() for value in values])
def test_number_out_of_range_is_refused(flag, value, refused_training):
    refused_training(f"--{flag}={value}", mentions=flag)


@pytest.mark.parametrize("flag", ["max_tokens", "max_epochs"])
def test_empty_budget_is_refused(flag, refused, tiny_flags, text_file):
    flags = [f for f in tiny_flags if not f.startswith("--max_steps")]
    refused(train.main, *flags, f"--data={text_file}", f"--{flag}=0", mentions=f"--{flag}")


@pytest.mark.parametrize("flags", [["--gpus=1"], ["--accelerator=gpu"], ["--accelerator=cuda"]])
def test_training_on_a_missing_gpu_is_refused(flags, refused, text_file):
    refused(train.main, f"--data={text_file}", *flags, mentions=["GPU", "--accelerator cpu"])


def test_evaluating_and_sampling_on_a_missing_gpu_is_refused(refused, tiny_run):
    refused(evaluate.main, "--checkpoint", tiny_run, "--accelerator=gpu", mentions="--accelerator cpu")
    refused(sample.main, "--checkpoint", tiny_run, "--accelerator=gpu", mentions="--accelerator cpu")


def test_missing_or_short_data_is_refused(refused, tmp_path, tiny_flags):
    empty, short, folder = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "folder"
    empty.write_text("")
    short.write_text("too short")
    folder.mkdir()
    refused(train.main, *tiny_flags, "--data=nowhere.txt", mentions="nowhere.txt")
    refused(train.main, *tiny_flags, f"--data={empty}", mentions="empty.txt")
    refused(train.main, *tiny_flags, f"--data={folder}", mentions=str(folder))
    refused(train.main, *tiny_flags, f"--data={short}", mentions="--block_size 16")


def _token_folder(folder, train_bytes, vocab_size=50):
    folder.mkdir()
    (folder / "train.bin").write_bytes(train_bytes)
    (folder / "val.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
    counts = {"train_tokens": len(train_bytes) // 2, "val_tokens": 40}
    meta = {"format": 1, "dtype": "uint16", "vocab_size": vocab_size, **counts}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_damaged_token_files_are_refused(refused, tmp_path, tiny_flags):
    tokens = np.arange(100, dtype="<u2") % 50
    odd = _token_folder(tmp_path / "odd", tokens.tobytes() + b"x")
    refused(train.main, *tiny_flags, f"--data={odd}", mentions="train.bin")
    tokens[70] = 50
    beyond = _token_folder(tmp_path / "beyond", tokens.tobytes())
    refused(train.main, *tiny_flags, f"--data={beyond}", mentions=["train.bin", "token 50", "position 70"])
    no_tokenizer = _token_folder(tmp_path / "plain", (np.arange(100, dtype="<u2") % 50).tobytes())
    refused(train.main, *tiny_flags, f"--data={no_tokenizer}", "--tokenizer=byte", mentions="--tokenizer byte")


def test_two_budgets_in_yaml_are_refused(refused_training, refused, tmp_path, text_file):
    config = tmp_path / "two.yaml"
    config.write_text(f"data: {text_file}\nmax_steps: 3\nmax_epochs: 1\n")
    refused(train.main, "--config", config, mentions=["--max_steps", "--max_epochs", "exclude each other"])


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("batch_size: 2\nblock_size: [1\n", "line 3"),
        ("batch_size: 2\n\tblock_size: 1\n", "line 2"),
        ("batch_size: 2\nlearning_rat: 1\n", ["learning_rat", "did you mean", "learning_rate"]),
        ("batch_size: many\n", ["batch_size", "many"]),
        ("optim:\n  learning_rate: 1\n", "optim"),
        ("just words\n", "flag: value"),
        ("- a\n- b\n", "flag: value"),
        ("implementation: gpt5\n", ["--implementation gpt5", "mingpt"]),
        ("implementation: 5\n", "implementation"),
        ("trainer: fast\n", "trainer"),
        ("trainer: null\n", "trainer"),
        ("batch_size: null\n", "--batch_size"),
        ("model_type: [1]\n", "model_type"),
        ("1: 2\n", "flag: value"),
        ("\x00", "config.yaml"),
    ],
)
def test_wrong_yaml_is_refused(text, mentions, refused, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    refused(train.main, "--config", config, mentions=mentions)


def test_unreadable_yaml_is_refused(refused, tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    refused(train.main, "--config", "nowhere.yaml", mentions="nowhere.yaml")
    refused(train.main, "--config", tmp_path, mentions=str(tmp_path))
    refused(train.main, "--config", binary, mentions="binary.yaml")
    refused(train.main, "--config", mentions="--config")


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard"])
def test_unwritable_run_folder_is_refused(logger, refused_training, tmp_path):
    # A path below a file, because permissions do not stop root.
    file = tmp_path / "file"
    file.write_text("")
    refused_training(f"--out_dir={file / 'run'}", f"--logger={logger}", mentions=["--out_dir", "cannot be written"])
    refused_training(f"--out_dir={file}", f"--logger={logger}", mentions=["--out_dir", "cannot be written"])


def test_unwritable_result_file_is_refused(refused, tiny_run, tmp_path):
    refused(evaluate.main, "--checkpoint", tiny_run, "--json", tmp_path / "no" / "x.json", mentions="--json")


def test_resume_as_another_model_is_refused(refused_training, tiny_run):
    refused_training(
        "--resume", tiny_run, "--n_embd=32", "--max_steps=8", mentions=["last.ckpt", "--n_embd 32 contradicts"]
    )
    refused_training("--resume", tiny_run, "--n_layer=2", "--max_steps=8", mentions="last.ckpt")
    refused_training(
        "--resume", tiny_run, "--implementation=nanogpt", "--max_steps=8", mentions=["last.ckpt", "mingpt", "nanogpt"]
    )


def test_resume_of_a_finished_run_is_refused(refused_training, tiny_run):
    refused_training("--resume", tiny_run, mentions=["step 4", "--max_steps"])


def test_missing_run_is_refused(refused_training, refused, tmp_path):
    refused_training("--resume", mentions="no run")
    refused_training("--resume", "nowhere", mentions="nowhere")
    refused_training("--resume", tmp_path, mentions=str(tmp_path))
    refused(evaluate.main, mentions="no run")
    refused(sample.main, mentions="no run")


@pytest.fixture
def not_checkpoints(tmp_path):
    """Write files that are not our checkpoints."""
    garbage, empty, weights, listed, code = (
        tmp_path / f"{n}.ckpt" for n in ("garbage", "empty", "weights", "listed", "code")
    )
    garbage.write_bytes(b"this is not a checkpoint\n" * 9)
    empty.write_bytes(b"")
    torch.save({"w": torch.zeros(2)}, weights)
    torch.save([1, 2], listed)
    torch.save({"run": os.system}, code)
    return garbage, empty, weights, listed, code


def test_file_that_is_no_checkpoint_is_refused(refused, refused_training, not_checkpoints):
    for file in not_checkpoints:
        refused(evaluate.main, "--checkpoint", file, mentions=file.name)
        refused(sample.main, "--checkpoint", file, mentions=file.name)
        refused_training("--resume", file, mentions=file.name)


def test_truncated_checkpoint_is_refused(refused, tiny_run, tmp_path):
    whole = (tiny_run / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(evaluate.main, "--checkpoint", cut, mentions="cut.ckpt")


def test_text_with_unknown_characters_is_refused(refused, tiny_run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("XYZ 123\n" * 99)
    refused(evaluate.main, "--checkpoint", tiny_run, "--data", other, mentions="other.txt")


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--prompt", "cat\u00e9"], ["--prompt", "U+00E9"]),
        (["--prompt", ""], ["--prompt"]),
        (["--which", "worst"], ["--which worst", "best", "last"]),
        (["--temperature", "0"], ["--temperature"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--top_k", "0"], ["--top_k"]),
        (["--num_samples", "0"], ["--num_samples"]),
        (["--max_new_tokens", "-1"], ["--max_new_tokens"]),
        (["--max_new_token", "9"], ["did you mean --max_new_tokens?"]),
        (["--seed", "x"], ["--seed"]),
    ],
)
def test_wrong_sample_options_are_refused(flags, mentions, refused, tiny_run):
    refused(sample.main, "--checkpoint", tiny_run, *flags, mentions=mentions)


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--batch_size", "0"], ["--batch_size"]),
        (["--eval_batches", "-1"], ["--eval_batches"]),
        (["--accelerator", "abacus"], ["--accelerator abacus"]),
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--chekpoint", "x"], ["did you mean --checkpoint?"]),
    ],
)
def test_wrong_evaluate_options_are_refused(flags, mentions, refused, tiny_run):
    refused(evaluate.main, "--checkpoint", tiny_run, *flags, mentions=mentions)


def test_missing_value_of_a_model_field_is_refused(refused, monkeypatch, tmp_path, tiny_flags, text_file):
    lines = (
        "from dataclasses import dataclass",
        "from torch import nn",
        "@dataclass\nclass Sizes:\n    vocab_size: int\n    block_size: int\n    width: int",
        "class Model(nn.Module):\n    def __init__(self, sizes: Sizes): super().__init__()",
    )
    (tmp_path / "foreign_without_default.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    flags = [f for f in tiny_flags if not f.startswith("--n_")]
    name = "foreign_without_default:Model"
    refused(train.main, *flags, f"--data={text_file}", "--implementation", name, mentions="--width")
    refused(train.main, *flags, f"--data={text_file}", "--implementation", name, "--width=x", mentions="--width")


def test_shell_command_prints_one_line_only(tmp_path):
    """Check in a real process that stderr has nothing else, such as warnings of Lightning."""
    command = [sys.executable, REPO / "train.py", "--strategy", "dpp", "--data"]
    done = subprocess.run([*command, REPO / "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --strategy dpp is unknown; choose one of auto, ddp")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
