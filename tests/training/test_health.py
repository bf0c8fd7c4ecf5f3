"""Bad numbers: steps whose loss or gradient is not finite, spikes, and schedules that cannot be meant.

The model of these tests is nanogpt with chosen faults in chosen micro-batches of chosen ranks.
"""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import lightning_gpt
import train
from lightning_gpt.cli import parse_train
from lightning_gpt.models import GPTModule
from lightning_gpt.training.health import Health, SkipRule
from tests.launching import run_python

REPO = Path(__file__).parents[2]
MODEL = '''
import ctypes, os
from dataclasses import dataclass, field
import torch
import torch.distributed as dist
from nanogpt.model import GPT, GPTConfig

if "FILL_WITH_NAN" in os.environ:  # memory that is allocated and not written (M_PERTURB of glibc)
    ctypes.CDLL(None).mallopt(-6, 256)

class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")

FAULTS = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss + float("inf") * loss.detach(),  # has a finite gradient
    "gradient": BadGradient.apply,
    "spike": lambda loss: loss * 1e4,
}

@dataclass
class FaultyConfig(GPTConfig):
    faults: str = field(default="", metadata={"changeable": True})
    """faults by micro-batch, such as 3:nan,5:inf"""
    faulty_rank: int = 0
    """the rank that has them"""

class Faulty(GPT):
    def __init__(self, config: FaultyConfig):
        super().__init__(config)
        self.micro_batches = 0

    def forward(self, idx, targets=None, *, cache=None):
        logits, loss = super().forward(idx, targets, cache=cache)
        if loss is not None and self.training:
            self.micro_batches += 1
            rank = dist.get_rank() if dist.is_initialized() else 0
            for fault in filter(None, self.config.faults.split(",")):
                count, kind = fault.split(":")
                if int(count) == self.micro_batches and rank == self.config.faulty_rank:
                    loss = FAULTS[kind](loss)
        return logits, loss
'''
FLAGS = (
    "--implementation=faulty_model:Faulty --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4"
    " --eval_batches=2 --logger=csv --accelerator=cpu --sample_tokens=0 --warmup_steps=0 --learning_rate=1e-2"
).split()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "faulty_model.py").write_text(MODEL)
    return folder


@pytest.fixture
def run_flags(model_folder, text_file, tmp_path, monkeypatch) -> list[str]:
    """Return the flags of a run with the faulty model into `tmp_path/run`."""
    monkeypatch.syspath_prepend(model_folder)
    return [*FLAGS, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"]


class Snapshots(Callback):
    """Copy weights, optimizer state and learning rate after each optimizer step."""

    def __init__(self):
        self.states, self.rates = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            optimizer = trainer.optimizers[0]
            moments = [v for state in optimizer.state.values() for v in state.values()]
            self.states[trainer.global_step] = [t.detach().clone() for t in (*pl_module.parameters(), *moments)]
            self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]


def column(run: Path, name: str) -> dict[int, float]:
    rows = [row for file in sorted(run.glob("logs/*/metrics.csv")) for row in csv.DictReader(file.open())]
    return {int(float(row["step"])): float(row[name]) for row in rows if row.get(name)}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--faults=3:nan"], "the loss is not finite on rank 0"),
        (["--faults=3:inf", "--gradient_clip_val=0"], "the loss is not finite on rank 0"),
        (["--faults=3:gradient"], "the gradient norm is not finite, though the loss is on all ranks"),
        (["--faults=3:nan", "--optimizer=muon"], "the loss is not finite on rank 0"),
        (["--faults=5:nan", "--grad_accum=2"], "the loss is not finite on rank 0"),
        (["--faults=3:nan", "--precision=bf16-true"], "the loss is not finite on rank 0"),
    ],
    ids=["nan", "inf without clipping", "gradient", "muon", "accumulation", "bf16"],
)
def test_bad_step_leaves_weights_and_moments_as_they_are(run_flags, flags, reason, tmp_path, capsys):
    seen = Snapshots()
    more = ["--max_steps=5", "--eval_interval=5", "--log_every_n_steps=1", "--max_bad_steps=2"]
    lightning_gpt.train(parse_train([*run_flags, *flags, *more]), callbacks=[seen])
    assert f"step 3: {reason}; skipped\n" in capsys.readouterr().out
    assert same(seen.states[2], seen.states[3])
    for step in (2, 4, 5):
        assert not same(seen.states[step - 1], seen.states[step])
    assert all(t.isfinite().all() for t in seen.states[5])
    # The schedule does not wait: the rate of each step is lower than that of the step before.
    assert sorted(seen.rates.values(), reverse=True) == list(seen.rates.values()) and len(set(seen.rates.values())) == 5
    assert column(tmp_path / "run", "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5 and saved["callbacks"]["Health"]["skipped_steps"] == 1
    assert all(t.isfinite().all() for t in saved["state_dict"].values())


@pytest.mark.parametrize(("limit", "stops_at"), [(0, 5), (3, 7)])
def test_bad_steps_in_a_row_stop_the_run(run_flags, tmp_path, capsys, limit, stops_at):
    flags = [*run_flags, "--faults=2:nan,5:nan,6:inf,7:gradient,8:nan", "--eval_interval=4", "--log_every_n_steps=10"]
    if limit == 0:
        flags.append("--faults=5:nan")
    last = tmp_path / "run/checkpoints/last.ckpt"
    written = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            if last.exists():
                written[trainer.global_step] = digest(last)

    with pytest.raises(SystemExit) as stop:
        lightning_gpt.train(parse_train([*flags, "--max_steps=20", f"--max_bad_steps={limit}"]), callbacks=[Watch()])
    out, err = capsys.readouterr()
    assert stop.value.code == 3
    line = err.splitlines()[-1]
    assert line.startswith(f"error: step {stops_at}: the ") and "is not finite" in line, err
    assert f"the last good checkpoint is {last}; to continue: python train.py --resume {tmp_path / 'run'}" in line
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert digest(last) == written[5]  # `last` is what step 4 wrote
    assert ("step 2: the loss is not finite on rank 0; skipped" in out) == (limit == 3)


def test_run_without_checkpoint_says_so(run_flags, capsys):
    faults = ",".join(f"{step}:nan" for step in range(1, 30))
    with pytest.raises(SystemExit) as stop:
        train.main([*run_flags, f"--faults={faults}", "--max_steps=30"])
    out, err = capsys.readouterr()
    assert stop.value.code == 3 and "steps 1 to 9: the loss is not finite on rank 0; skipped\n" in out
    assert "bad step 10 in a row (--max_bad_steps 10); no checkpoint was saved\n" in err


def test_weights_that_are_not_finite_are_not_saved(run_flags, tmp_path, capsys):
    train.main([*run_flags, "--max_steps=4", "--eval_interval=4"])
    files = sorted((tmp_path / "run/checkpoints").iterdir())
    before = [digest(file) for file in files]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*run_flags, f"--resume={tmp_path / 'run'}", "--max_steps=6", "--learning_rate=1e39"])
    assert stop.value.code == 3
    assert "error: step 6: weights or optimizer state are not finite" in capsys.readouterr().err
    assert [digest(file) for file in files] == before and sorted((tmp_path / "run/checkpoints").iterdir()) == files


def test_loss_scaler_overflow_is_no_bad_step(model_folder, monkeypatch, capsys):
    """Train as in fp16's mixed precision, on the CPU with bfloat16 and a GradScaler whose first scale is too large."""
    monkeypatch.syspath_prepend(model_folder)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    monkeypatch.setattr(plugin, "autocast_context_manager", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    sizes = dict(vocab_size=10, block_size=8, n_layer=1, n_head=1, n_embd=8)
    module = GPTModule("faulty_model:Faulty", model_config={**sizes, "faults": "2:spike,4:nan"})
    idx = torch.arange(9).repeat(64, 1)
    loader = DataLoader(TensorDataset(idx[:, :-1], idx[:, 1:]), batch_size=8)
    health, seen = Health(max_bad_steps=2, spike_sigma=None), Snapshots()
    plain = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    settings = dict(max_steps=5, accelerator="cpu", log_every_n_steps=1, **plain)
    Trainer(plugins=[plugin], callbacks=[health, seen], **settings).fit(module, loader)
    assert [same(seen.states[step - 1], seen.states[step]) for step in (2, 3, 4, 5)] == [True, False, True, False]
    assert scaler.get_scale() == 2.0**118, "the scaler did not overflow twice"
    assert health.skipped_steps == 1
    assert capsys.readouterr().out == "step 4: the loss is not finite on rank 0; skipped\n"


def test_spike_is_skipped_and_its_statistics_survive_resume(run_flags, tmp_path, capsys):
    flags = [*run_flags, "--eval_interval=110", "--spike_sigma=20", "--lr_decay_steps=200"]
    train.main([*flags, "--max_steps=110", "--faults=105:spike"])
    line = r"step (\d+): the gradient norm .* is a spike, above .*; skipped"
    assert re.findall(line, capsys.readouterr().out) == ["105"]
    seen = Snapshots()
    resumed = [f"--resume={tmp_path / 'run'}", "--max_steps=116", "--faults=4:spike"]
    lightning_gpt.train(parse_train([*flags, *resumed]), callbacks=[seen])
    assert re.findall(line, capsys.readouterr().out) == ["114"]
    assert same(seen.states[113], seen.states[114]) and not same(seen.states[114], seen.states[115])
    assert column(tmp_path / "run", "skipped_steps")[110] == 1
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["callbacks"]["Health"]["skipped_steps"] == 2


def test_spike_statistics_match_the_formula():
    norms = np.random.default_rng(0).normal(3, 0.5, 130).tolist()
    rule = SkipRule(4.0, statistics=[0.0, 0.0, 0.0], device=torch.device("cpu"))
    assert [rule(torch.tensor(x)).item() for x in norms[:100]] == [0] * 100
    mean, variance, count = rule.statistics.tolist()
    assert (mean, variance) == pytest.approx((np.mean(norms[:100]), np.var(norms[:100])), rel=1e-5) and count == 100
    for x in (*norms[100:], 99.0, math.nan, math.inf):
        bound = mean + 4 * math.sqrt(variance)
        assert rule(torch.tensor(x)).item() == (not x <= bound)
        if math.isfinite(x):
            change = min(x, bound) - mean
            mean, variance = mean + 0.01 * change, 0.99 * (variance + 0.01 * change**2)
        assert rule.statistics.tolist()[:2] == pytest.approx((mean, variance), rel=1e-5)
    accepted = [rule(torch.tensor(9.0)).item() for _ in range(100)]  # a lasting rise
    assert accepted[0] == 1 and accepted[-1] == 0


class HostReads(TorchDispatchMode):
    """Count the conversions of tensors to Python numbers, each of which waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [[], ["--spike_sigma=5", "--grad_accum=2"]], ids=["default", "spikes"])
def test_only_logged_steps_wait_for_the_device(run_flags, flags):
    reads, counts = HostReads(), {}

    class Count(Callback):
        def on_train_batch_start(self, trainer, *_):  # the end of a batch comes after all hooks
            counts[trainer.global_step] = reads.count

    config = parse_train([*run_flags, "--max_steps=23", "--log_every_n_steps=7", *flags])
    config.trainer.trainer.pop("enable_progress_bar")
    with reads:
        lightning_gpt.train(config, callbacks=[Count()])
    new = {step: counts[step] - counts[step - 1] for step in range(1, 23)}
    assert {step for step, count in new.items() if count} == {7, 14, 21}


STRATEGIES = ["fsdp", "ddp", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
MARKS = {"fsdp": [], "ddp": [pytest.mark.slow]}
FAULTS = "--faults=3:nan,105:spike,109:nan,110:inf,111:nan"
RANK_FLAGS = [
    "--eval_interval=107",
    "--max_steps=120",
    "--log_every_n_steps=10",
    "--max_bad_steps=2",
    "--spike_sigma=20",
]


@pytest.fixture(scope="module")
def one_process(model_folder, text_file, tmp_path_factory):
    """Return what a single process prints that trains on the global batches of two ranks."""
    flags = [
        *FLAGS,
        *RANK_FLAGS,
        FAULTS,
        "--batch_size=8",
        f"--data={text_file}",
        "--trainer.enable_progress_bar=false",
    ]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit), contextlib.redirect_stdout(printed):
        patch.syspath_prepend(model_folder)
        train.main([*flags, f"--out_dir={tmp_path_factory.mktemp('one') / 'run'}"])
    return printed.getvalue()


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=MARKS.get(name, [pytest.mark.slow, needs_deepspeed])) for name in STRATEGIES]
)
def test_bad_numbers_on_one_rank(strategy, one_process, model_folder, text_file, tmp_path):
    command = [REPO / "train.py", *FLAGS, *RANK_FLAGS, FAULTS, "--faulty_rank=1", "--devices=2"]
    command += [f"--strategy={strategy}", f"--data={text_file}", "--out_dir=run", "--trainer.enable_progress_bar=false"]
    command.append("--eval_batches=4")
    path = os.pathsep.join([str(model_folder), str(REPO)])
    done = run_python(*command, ranks=2, cwd=tmp_path, env={"PYTHONPATH": path}, timeout=600)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "step 3: the loss is not finite on rank 1; skipped\n" in done.stdout
    assert re.search(r"\nstep 105: the gradient norm .* is a spike, above .*; skipped\n", done.stdout), done.stdout
    assert "step 109: the loss is not finite on rank 1; skipped\n" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    stop = "error: step 110: the loss is not finite on rank 1, bad step 2 in a row (--max_bad_steps 2); the last good"
    command = f"python {REPO / 'train.py'} --resume run"
    assert errors == [f"{stop} checkpoint is run/checkpoints/last.ckpt; to continue: {command}"]
    assert "Traceback" not in done.stderr
    # The same steps were skipped, and the others were not: the loss is that of a single process.
    ours, theirs = (re.search(r"\nstep 107: .*val_loss ([\d.]+)\n", out) for out in (done.stdout, one_process))
    assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=2e-3)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_padding_of_shards_may_hold_anything(model_folder, text_file, tmp_path):
    command = [REPO / "train.py", *FLAGS, "--n_head=1", "--n_embd=17", "--strategy=deepspeed_stage_3", "--devices=2"]
    command += [f"--data={text_file}", "--out_dir=run", "--max_steps=3"]
    path = os.pathsep.join([str(model_folder), str(REPO)])
    done = run_python(*command, ranks=2, cwd=tmp_path, env={"PYTHONPATH": path, "FILL_WITH_NAN": "1"})
    assert done.returncode == 0, done.stderr


def test_schedule_that_cannot_be_meant(run_flags, refused, capsys):
    refused(train.main, *run_flags, "--min_learning_rate=0.1", mentions=["--min_learning_rate 0.1", "0.01"])
    flags = ["--warmup_steps=9", "--lr_decay_steps=8"]
    refused(train.main, *run_flags, *flags, mentions=["--warmup_steps 9", "--lr_decay_steps 8"])
    train.main([*run_flags, "--warmup_steps=2000", "--max_steps=1K", "--dry_run"])
    warning = "warning: --warmup_steps 2000 lasts longer than the run's 1000 steps, so the learning rate never reaches"
    assert capsys.readouterr().err == f"{warning} 0.01\n"
