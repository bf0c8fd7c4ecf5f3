"""Token files that change while a run reads them: truncated, replaced or deleted."""

import os
import shutil

import numpy as np
import pytest
import torch
from lightning import Callback

import lightning_gpt
from lightning_gpt.cli import reporting_errors
from lightning_gpt.data import streams
from lightning_gpt.data.tokens.mapping import TokenFile, TruncatedFile
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.tokenizers import CharTokenizer

LETTERS = CharTokenizer("abcdefg\n")
N_TOKENS = 40_000  # several pages


class AtStep(Callback):
    """Call a function before a training step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act()


def write(folder, seed, n_tokens=N_TOKENS):
    tokens = np.random.default_rng(seed).integers(0, 8, n_tokens)
    write_token_files(folder, train=tokens, val=tokens[:999], tokenizer=LETTERS, vocab_size=8, source="letters")
    return folder


def train(flags, callback):
    return lightning_gpt.train(lightning_gpt.parse_train([str(flag) for flag in flags]), callbacks=[callback])


@pytest.mark.parametrize(("split", "workers"), [("train", 0), ("train", 1), ("val", 0)])
def test_truncated_file_ends_the_run_with_one_line(tmp_path, tiny_flags, capsys, split, workers):
    data = write(tmp_path / "letters", seed=0)
    cut = AtStep(3, lambda: os.truncate(data / f"{split}.bin", 100))
    flags = [*tiny_flags, f"--data={data}", f"--out_dir={tmp_path / 'run'}", f"--num_workers={workers}"]
    with pytest.raises(SystemExit) as stop:
        reporting_errors(lambda argv: train(argv, cut))([*flags, "--max_steps=40"])
    err = capsys.readouterr().err
    [line] = err.strip().splitlines()
    assert stop.value.code == 2
    assert line.startswith(f"error: {data / f'{split}.bin'} was truncated while it was read; "), err
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] >= 2


@pytest.mark.parametrize("size", [0, 8])
def test_truncated_file_is_noticed_when_it_is_mapped_again(tmp_path, size):
    opener = TokenFile(write(tmp_path / "letters", seed=0) / "train.bin", dtype=np.dtype("<u2"), n_tokens=N_TOKENS)
    assert len(opener()) == N_TOKENS
    os.truncate(opener.path, size)
    with pytest.raises(TruncatedFile, match=f"^{opener.path} was truncated"):
        opener()


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_run_goes_on_with_its_own_tokens(tmp_path, tiny_flags, monkeypatch, change):
    monkeypatch.setattr(streams, "_CHUNK_BATCHES", 2)  # so that a short run maps the file again
    data = write(tmp_path / "letters", seed=0)
    changes = {"replaced": lambda: write(data, seed=1, n_tokens=500), "deleted": lambda: shutil.rmtree(data)}
    flags = [*tiny_flags, f"--data={data}", "--max_steps=8", "--eval_interval=4"]
    undisturbed, run = (
        train([*flags, f"--out_dir={tmp_path / name}"], AtStep(3, act))
        for name, act in {"undisturbed": lambda: None, change: changes[change]}.items()
    )
    ours, theirs = (torch.load(folder / "checkpoints" / "last.ckpt") for folder in (run, undisturbed))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
