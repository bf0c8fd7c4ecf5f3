"""The LightningModules under a plain Trainer, and whole runs through the entry points."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import evaluate
import lightning_gpt
import sample
import train
from lightning_gpt import MinGPT, NanoGPT
from lightning_gpt.cli import parse_train

REPO = Path(__file__).parents[2]
SIZES = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "8", "--batch_size", "4"]
QUIET = ["--sample_tokens", "0", "--accelerator", "cpu", "--logger", "csv", "--log_every_n_steps", "1"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)


def rows(run: Path) -> list[dict[str, str]]:
    return [row for file in sorted(run.glob("logs/*/metrics.csv")) for row in csv.DictReader(file.open())]


def column(run: Path, name: str) -> dict[int, float]:
    return {int(float(row["step"])): float(row[name]) for row in rows(run) if row.get(name)}


@pytest.mark.parametrize("cls", [MinGPT, NanoGPT])
def test_plain_trainer_trains_and_loads_a_checkpoint(cls: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    idx = torch.arange(9).repeat(64, 1)  # counting up, learned in a few steps
    loader = DataLoader(TensorDataset(idx[:, :-1], idx[:, 1:]), batch_size=8)
    module = cls(vocab_size=10, block_size=8, model_type="gpt-nano", n_layer=1, learning_rate=1e-2)
    assert (module.model.config.n_layer, module.model.config.n_embd) == (1, 48)  # the preset with one size overridden
    trainer = Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val_loss"] < 0.5
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    module.eval(), again.eval()
    torch.testing.assert_close(again(idx[:2, :8])[0], module(idx[:2, :8])[0])
    assert module.generate(idx[:1, :3], 4, do_sample=False).tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("cls", [MinGPT, NanoGPT])
def test_decay_groups_match_the_originals(cls: type) -> None:
    module = cls(vocab_size=10, block_size=8, model_type="gpt-nano")
    decayed, rest = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    named = dict(module.model.named_parameters())
    if cls is NanoGPT:
        expected = {name for name, p in named.items() if p.dim() >= 2}
    else:
        linear = {name for name, m in module.model.named_modules() if isinstance(m, nn.Linear)}
        expected = {name for name in named if name.rpartition(".")[0] in linear and name.endswith("weight")}
        assert "lm_head.weight" in expected and "transformer.wte.weight" not in expected
    assert {id(p) for p in decayed["params"]} == {id(named[name]) for name in expected}
    assert {id(p) for p in rest["params"]} == {id(named[name]) for name in named.keys() - expected}


def test_run_learns_logs_saves_evaluates_and_samples(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--data", text, *SIZES, "--accelerator", "cpu", "--logger", "csv", "--log_every_n_steps", "5"]
    flags += ["--learning_rate", "0.01", "--max_steps", "62", "--eval_interval", "30", "--eval_batches", "0"]
    train.main([*flags, "--out_dir", str(run), "--prompt", "the", "--sample_tokens", "20"])
    out = capsys.readouterr().out
    assert "model     mingpt 1/2/16, block 8" in out and "--- sample ---\nthe" in out
    assert "\nspeed     " in out and "MFU" not in out  # the peak of a CPU is unknown
    assert f"python sample.py --checkpoint {run}" in out
    learnt = column(run, "train_loss")
    assert list(learnt) == list(range(5, 61, 5)) and learnt[60] < learnt[5] - 0.5
    for name in ("tokens_per_second", "step_time_ms", "learning_rate", "grad_norm", "peak_memory_mib"):
        assert all(value > 0 for value in column(run, name).values()) and len(column(run, name)) == 12
    validated = column(run, "val_loss")
    assert list(validated) == [30, 60, 62]  # the last step is validated and saved too
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 62 and saved["TokenData"]["consumed_samples"] == 62 * 4

    evaluate.main(["--checkpoint", str(run), "--which", "last", "--json", str(tmp_path / "score.json")])
    assert capsys.readouterr().out.startswith(f"checkpoint    {run}")  # the scores and nothing else
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["loss"] == pytest.approx(validated[62], rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert score["tokens"] == 269  # a tenth of 2,700 characters, without the first
    assert score["bits_per_byte"] == pytest.approx(score["loss"] / math.log(2) * 269 / 270)

    capsys.readouterr()
    sample.main(["--checkpoint", str(run), "--prompt", "the", "--max_new_tokens", "9", "--num_samples", "2"])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("the") and len(first) == 12 and first != second


def test_validation_loss_equals_a_plain_sum_over_the_split(tmp_path: Path, text: str) -> None:
    """Compare with a loop over single sequences, without padding."""
    from lightning_gpt.checkpoint import open_checkpoint
    from lightning_gpt.data.tokens.preparation import prepare

    train.main(["--data", text, *SIZES, *QUIET, "--max_steps", "2", "--out_dir", str(tmp_path / "r"), "--seed", "3"])
    model = open_checkpoint(tmp_path / "r" / "checkpoints" / "last.ckpt").module().model.eval()
    tokens = torch.from_numpy(prepare(text, tokenizer="char", block_size=8).tokens("val").astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 8):
            idx, targets = tokens[start : start + 8], tokens[start + 1 : start + 9]
            logits = model(idx[: len(targets)][None])[0][0].double()
            total -= logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    assert column(tmp_path / "r", "val_loss")[2] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_ranks_train_as_one(tmp_path: Path, text: str, launcher: str) -> None:
    """Compare training and validation of the same global batches; ranks pad the validation differently."""
    flags = ["--implementation", "nanogpt", "--data", text, *SIZES, *QUIET, "--max_steps", "6", "--eval_interval", "3"]
    flags += ["--eval_batches", "5"]
    train.main([*flags, "--batch_size", "6", "--out_dir", str(tmp_path / "one"), "--eval_batches", "5"])
    if launcher == "lightning":
        start = [sys.executable, str(REPO / "train.py"), "--strategy", "ddp", "--devices", "2"]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        start += [str(REPO / "train.py")]
    two = [*flags, "--batch_size", "3", "--eval_batches", "10", "--out_dir", str(tmp_path / "two")]
    subprocess.run([*start, *two], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, check=True, timeout=300)
    for name in ("train_loss", "val_loss", "grad_norm"):
        one, both = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert one.keys() == both.keys() and len(one) >= 2
        assert list(both.values()) == pytest.approx(list(one.values()), rel=1e-5), name
    assert not (tmp_path / "runs").exists()


def test_gradient_norm_is_independent_of_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the logged norm is that of the unscaled gradient."""
    norms = {}
    for scale in (1.0, 65536.0):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        monkeypatch.setattr(plugin, "autocast_context_manager", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
        torch.manual_seed(0)
        module = MinGPT(vocab_size=10, block_size=8, model_type="gpt-nano", embd_pdrop=0, resid_pdrop=0, attn_pdrop=0)
        idx = torch.arange(9).repeat(8, 1)
        loader = DataLoader(TensorDataset(idx[:, :-1], idx[:, 1:]), batch_size=8)
        plain = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        Trainer(max_steps=1, accelerator="cpu", gradient_clip_val=1.0, plugins=[plugin], **plain).fit(module, loader)
        norms[scale] = float(module.gradient_norm())
    assert norms[65536.0] == pytest.approx(norms[1.0], rel=1e-2) and norms[1.0] > 0


def test_accumulation_equals_a_larger_batch(tmp_path: Path, text: str) -> None:
    flags = ["--implementation", "nanogpt", "--data", text, *SIZES, *QUIET, "--max_steps", "5"]
    train.main([*flags, "--batch_size", "6", "--out_dir", str(tmp_path / "a")])
    train.main([*flags, "--batch_size", "2", "--grad_accum", "3", "--out_dir", str(tmp_path / "b")])
    a, b = column(tmp_path / "a", "train_loss"), column(tmp_path / "b", "train_loss")
    assert a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("budget", "steps"), [(["--max_tokens", "100"], 4), (["--max_epochs", "0.1"], 8), (["--max_steps", "3"], 3)]
)
def test_budgets(tmp_path: Path, text: str, budget: list[str], steps: int) -> None:
    """A step has 32 tokens; an epoch has 2430 // 8 - 1 = 302 windows, so 0.1 epochs are 30.2 windows of 4 per step."""
    train.main(["--data", text, *SIZES, *QUIET, *budget, "--out_dir", str(tmp_path / "r")])
    assert torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
def test_compiled_blocks_train_as_eager_ones(tmp_path: Path, text: str, implementation: str) -> None:
    flags = ["--implementation", implementation, "--data", text, *SIZES, *QUIET, "--max_steps", "4"]
    flags += ["--embd_pdrop=0", "--resid_pdrop=0", "--attn_pdrop=0"] if implementation == "mingpt" else []
    train.main([*flags, "--out_dir", str(tmp_path / "eager")])
    train.main([*flags, "--out_dir", str(tmp_path / "compiled"), "--compile"])
    eager, compiled = column(tmp_path / "eager", "train_loss"), column(tmp_path / "compiled", "train_loss")
    assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-4)
    keys = [
        torch.load(tmp_path / r / "checkpoints/last.ckpt", weights_only=True)["state_dict"].keys()
        for r in ("eager", "compiled")
    ]
    assert keys[0] == keys[1]


def test_several_loggers_get_the_settings(tmp_path: Path, text: str) -> None:
    flags = ["--data", text, *SIZES, *QUIET, "--max_steps=1", "--logger=csv,tensorboard", "--seed=77"]
    train.main([*flags, f"--out_dir={tmp_path}/run"])
    [events] = (tmp_path / "run" / "logs").rglob("events.*")
    assert b"settings" in events.read_bytes() and b"|seed|77|" in events.read_bytes()
    assert len(list((tmp_path / "run" / "logs").rglob("metrics.csv"))) == 1
    [written] = (tmp_path / "run" / "logs").rglob("hparams.yaml")  # they share a folder
    assert "seed: 77" in written.read_text()


class FakeClock(Callback):
    """A clock by which the first step takes 100 s, any other 1 s, and a validation batch 50 s."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self.now += 1 if trainer.global_step else 100

    def on_validation_batch_start(self, *_: object) -> None:
        self.now += 50


@pytest.mark.parametrize(("steps", "accumulate", "shown"), [(7, 1, 1.0), (7, 3, 3.0), (1, 1, 100.0)])
def test_printed_speed_counts_steady_steps(steps, accumulate, shown, tmp_path, text, monkeypatch, capsys):
    clock = FakeClock()
    for module in ("lightning_gpt.training.callbacks.time", "lightning_gpt.strategies.devices.time"):
        monkeypatch.setattr(module, clock)
    flags = ["--data", text, *SIZES, "--sample_tokens=0", "--accelerator=cpu", "--logger=csv", "--log_every_n_steps=3"]
    flags += [f"--max_steps={steps}", "--eval_interval=2", f"--grad_accum={accumulate}", f"--out_dir={tmp_path}/run"]
    lightning_gpt.train(parse_train(flags), callbacks=[clock])
    assert f" tokens/s, {shown * 1000:.1f} ms/step" in capsys.readouterr().out
