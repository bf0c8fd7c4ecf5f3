"""Muon: parameter groups, equality with torch.optim.Muon, and state under strategies, precisions and checkpoints."""

import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

import evaluate
import train
from lightning_gpt import MinGPT, NanoGPT, UserError
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.models import FORMS, GPTModule
from lightning_gpt.optim import muon
from tests.launching import run_python

REPO = Path(__file__).parents[2]
SIZES = {"vocab_size": 11, "block_size": 8, "model_type": None, "n_layer": 2, "n_head": 2, "n_embd": 12}
HIDDEN = {
    f"transformer.h.{i}.{name}.weight": 3 if name == "attn.c_attn" else 1
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


@dataclass
class Config:
    vocab_size: int = 11
    block_size: int = 8
    tied: bool = False
    parts: int = 1
    layers: int = 1


class Plain(nn.Module):
    """A model without a Block class; its head may be tied to its embedding."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, 6)
        self.body = nn.Sequential(*(nn.Linear(6, 6) for _ in range(config.layers)))
        for layer in self.body:
            layer.parts = config.parts
        self.gate = nn.Parameter(torch.ones(6, 6))
        self.head = nn.Linear(6, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, idx, targets=None):
        logits = self.head(self.body(self.embed(idx)) @ self.gate)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


def batches(count: int, size: int = 4) -> torch.utils.data.DataLoader:
    torch.manual_seed(1)
    tokens = torch.randint(0, 11, (count * size, 9))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=size, shuffle=False
    )


def fit(module: GPTModule, steps: int = 4, **arguments) -> GPTModule:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accumulate = arguments.get("accumulate_grad_batches", 1)
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=1, **quiet, **arguments)
    trainer.fit(module, batches(steps * accumulate))
    return module


# Parameter groups


@pytest.mark.parametrize("cls", [MinGPT, NanoGPT])
@pytest.mark.parametrize("changed", [{}, {"recompute": True, "compile": "eager"}, {"freeze_embeddings": True}], ids=str)
def test_groups_hidden_matrices_to_muon_and_rest_to_adamw(cls, changed):
    module = cls(**SIZES, optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.05, **changed)
    groups = module.configure_optimizers()["optimizer"].param_groups
    taken = {name: group["parts"] for group in groups if "parts" in group for name in group["param_names"]}
    assert taken == HIDDEN
    assert {group["initial_lr"] for group in groups if "parts" in group} == {0.05}
    assert {group["initial_lr"] for group in groups if "parts" not in group} == {1e-3}
    adamw = cls(**SIZES, **changed).configure_optimizers()["optimizer"].param_groups
    expected = {name: group["weight_decay"] for group in adamw for name in group["param_names"]}
    assert {name: group["weight_decay"] for group in groups for name in group["param_names"]} == expected
    owned = {id(p) for group in groups for p in group["params"]}
    assert owned == {id(p) for p in module.parameters() if p.requires_grad}


def test_hidden_matrices_without_a_block_class():
    for tied in (False, True):
        module = GPTModule(f"{__name__}:Plain", model_config={"vocab_size": 11, "tied": tied}, optimizer="muon")
        assert module.hidden_matrices == {"body.0.weight": 1}
    # A Linear with as many rows as the vocabulary counts as a head.
    with pytest.raises(UserError, match="no nn.Linear between"):
        GPTModule(f"{__name__}:Plain", model_config={"vocab_size": 6}, optimizer="muon")
    with pytest.raises(UserError, match="body.0 has 6 rows.* parts = 4"):
        GPTModule(f"{__name__}:Plain", model_config={"vocab_size": 11, "parts": 4}, optimizer="muon")


def test_hidden_matrices_exclude_a_tied_projection(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "Block", nn.Sequential, raising=False)
    fields = {"vocab_size": 11, "layers": 2}
    module = GPTModule(f"{__name__}:Plain", model_config=fields, optimizer="muon")
    assert module.hidden_matrices == {"body.0.weight": 1, "body.1.weight": 1}
    module.model.gate = module.model.body[1].weight
    assert module.implementation.hidden_matrices(module.model, vocab_size=11) == {"body.0.weight": 1}


# Numerical equality


def grads_of(step: int, name: str, shape: torch.Size) -> torch.Tensor:
    """Return gradients of varying scale; those of attention output projections have low rank, as in real training."""
    generator = torch.Generator().manual_seed(hash((step, len(name), shape[0])) % 2**31)
    full = torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1)
    return full[:, :2] @ full[:2] if "attn.c_proj" in name and len(shape) == 2 else full


@pytest.mark.parametrize("together", [2**24, 500])
@pytest.mark.parametrize("cls", [MinGPT, NanoGPT])
def test_steps_equal_torch_muon_on_separate_matrices(cls, together, monkeypatch):
    """Compare with torch.optim.Muon in float32, with query, key and value separate, and with torch.optim.AdamW."""
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", together)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon computes in bfloat16
    module = cls(**SIZES, optimizer="muon", weight_decay=0.3, learning_rate=1e-2, warmup_steps=2, decay_steps=6)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = dict(module.model.named_parameters())
    parts = {n: [nn.Parameter(c.clone()) for c in p.detach().chunk(HIDDEN.get(n, 1))] for n, p in parameters.items()}
    decays = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    theirs = [
        torch.optim.Muon([p for n in HIDDEN for p in parts[n]], lr=0.02, weight_decay=0.3, adjust_lr_fn="original"),
        torch.optim.AdamW(
            [
                {"params": [p for n in parts if n not in HIDDEN and (n in decays) == d for p in parts[n]]}
                | {"weight_decay": 0.3 * d}
                for d in (True, False)
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, module.schedule) for o in theirs]
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(6):
        for name, p in parameters.items():
            p.grad = grads_of(step, name, p.shape)
            for part, grad in zip(parts[name], p.grad.chunk(len(parts[name])), strict=True):
                part.grad = grad
        for o in (optimizer, *theirs, scheduler, *schedules):
            o.step()
    for name, p in parameters.items():
        moved = torch.cat(parts[name])
        assert (moved - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(p.detach(), moved.detach(), rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert optimizer.state[parameters[next(iter(HIDDEN))]].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("columns", [24, 96], ids=["square", "wide"])
@pytest.mark.parametrize("rank", [24, 3])
def test_orthogonalise_matches_float64_formula(columns, rank):
    """Compare with the formula in float64 and with bfloat16, which GPUs use; singular values are close to 1."""
    torch.manual_seed(0)
    matrices = torch.randn(5, 24, rank) @ torch.randn(5, rank, columns) / rank + 1e-4 * torch.randn(5, 24, columns)
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    found = muon.orthogonalise(matrices)
    torch.testing.assert_close(found.double(), x, rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(found)[:, :rank]
    assert 0.6 < values.median() and values.max() < 1.3
    if rank == 24:
        half = muon.orthogonalise(matrices.bfloat16())
        assert half.dtype == torch.bfloat16 and (half - x).norm() < 0.05 * x.norm()
    assert not muon.orthogonalise(torch.zeros(2, 3, columns)).any()


# Under a Trainer


RANKS_SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, Shard
from torch.multiprocessing import start_processes
from lightning_gpt.optim import muon

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (12, 4), (7, 2)]  # rows that the ranks divide, do not divide, or lack

def steps(parameters, grads):
    optimizer = muon.Muon(
        [{"params": parameters, "parts": 1, "weight_decay": 0.1}],
        learning_rate=0.1, betas=(0.9, 0.95), muon_learning_rate=0.1,
    )
    for grad in grads:
        for p, g in zip(parameters, grad):
            p.grad = g.clone()
        optimizer.step()

def rank(index):
    os.environ |= {"RANK": str(index), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    dist.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (3,))
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    grads = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    whole = [w.clone() for w in weights]
    steps(whole, grads)
    count, original = [0], muon.orthogonalise
    muon.orthogonalise = lambda x: (count.__setitem__(0, count[0] + len(x)), original(x))[1]
    shard = lambda x: distribute_tensor(x, mesh, [Shard(0)])
    sharded = [shard(w) for w in weights]
    steps(sharded, [[shard(g) for g in grad] for grad in grads])
    difference = max(float((s.full_tensor() - w).abs().max()) for s, w in zip(sharded, whole))
    print(f"{count[0]} {difference}\\n", end="", flush=True)

if __name__ == "__main__":
    start_processes(rank, nprocs=3, start_method="fork")
"""


def test_sharded_matrices_are_divided_among_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, script, port], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [line.split() for line in done.stdout.splitlines()]
    # Six matrices and three steps: each matrix is orthogonalised on one rank, and no rank has all the work.
    counts = [int(count) for count, _ in ranks]
    assert len(ranks) == 3 and sum(counts) == 6 * 3 and max(counts) <= 9
    assert all(float(difference) < 1e-5 for _, difference in ranks)


def test_float16_loss_scaling_leaves_steps_unchanged():
    """Check that gradients are unscaled once, before clipping, and that a step with infinite gradients is skipped."""
    found = {}
    for scale in (1.0, 2.0**10):
        seed_everything(3, verbose=False)
        module = NanoGPT(**SIZES, dropout=0.0, optimizer="muon")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        fit(module, gradient_clip_val=0.1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        found[scale] = module
    torch.testing.assert_close(found[1.0].gradient_norm(), found[2.0**10].gradient_norm(), rtol=1e-2, atol=0)
    assert found[1.0].gradient_norm() > 0.1
    torch.testing.assert_close(*(m.model.state_dict() for m in found.values()), rtol=0, atol=5e-3)
    seed_everything(3, verbose=False)
    module = NanoGPT(**SIZES, dropout=0.0, optimizer="muon")
    before = {name: p.clone() for name, p in module.model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    fit(module, steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    torch.testing.assert_close(module.model.state_dict(), before, rtol=0, atol=0)


def test_training_unchanged_by_recomputation_and_compilation():
    found = []
    for changed in ({}, {"recompute": True}, {"compile": "eager"}):
        seed_everything(3, verbose=False)
        module = fit(NanoGPT(**SIZES, dropout=0.0, optimizer="muon", **changed))
        found.append(module.model.state_dict())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "fsdp"])
def test_training_with_bf16_weights_and_frozen_embeddings(form):
    seed_everything(3, verbose=False)
    fields = {k: v for k, v in SIZES.items() if k != "model_type"}
    module = FORMS[form]("nanogpt", model_config=fields, optimizer="muon", freeze_embeddings=True)
    fit(module, steps=1)
    before = {name: p.clone() for name, p in module.model.state_dict().items()}
    fit(module, precision="bf16-true")
    after = module.model.state_dict()
    assert torch.equal(after["transformer.wte.weight"].float(), before["transformer.wte.weight"].bfloat16().float())
    for name in HIDDEN:
        assert after[name].isfinite().all() and (after[name].float() - before[name]).abs().max() > 1e-3, name


def test_deepspeed_form_refuses_muon():
    with pytest.raises(UserError, match="--optimizer muon does not work under DeepSpeed: .*whole matrix"):
        FORMS["deepspeed"]("nanogpt", model_config={"vocab_size": 11}, optimizer="muon")


# Checkpoints


RUN = "--implementation=nanogpt --n_layer=2 --n_head=3 --n_embd=33 --block_size=15 --eval_interval=2".split()
RUN += "--accelerator=cpu --sample_tokens=0 --logger=none --lr_decay_steps=8 --optimizer=muon".split()
ADAM = {"step", "exp_avg", "exp_avg_sq"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text_file) -> Path:
    """Train 8 steps in one process and return the run folder; read-only."""
    out_dir = tmp_path_factory.mktemp("muon") / "uninterrupted"
    train.main([*RUN, "--batch_size=4", "--max_steps=8", f"--data={text_file}", f"--out_dir={out_dir}"])
    return out_dir


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def test_resume_under_other_strategies(uninterrupted, text_file, tmp_path):
    """Train two steps each in one process, under FSDP, under DDP, and in one process from the canonical form."""
    parts = tmp_path / "parts"
    train.main([*RUN, "--batch_size=4", "--max_steps=2", f"--data={text_file}", f"--out_dir={parts}"])
    for steps, strategy in ((4, "fsdp"), (6, "ddp")):
        flags = [f"--strategy={strategy}", "--devices=2", "--batch_size=2", f"--max_steps={steps}"]
        done = run_python(REPO / "train.py", f"--resume={parts}", *flags, ranks=2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if strategy == "fsdp":
            states = open_checkpoint(last(parts))
            evaluate.main([f"--checkpoint={last(parts)}", "--convert_only"])
            converted = open_checkpoint(last(parts).with_suffix(""))
            for name in states.names():
                ours, theirs = states.optimizer_state(name), converted.optimizer_state(name)
                hidden = name in HIDDEN
                assert ours.keys() == theirs.keys() == ({"momentum_buffer"} if hidden else ADAM), name
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    evaluate.main([f"--checkpoint={last(parts)}", "--convert_only"])
    resumed = [f"--resume={last(parts).with_suffix('')}", f"--data={text_file}", f"--out_dir={tmp_path / 'end'}"]
    train.main([*RUN, *resumed, "--strategy=auto", "--devices=1", "--batch_size=4", "--max_steps=8"])
    ours, expected = open_checkpoint(last(tmp_path / "end")), open_checkpoint(last(uninterrupted))
    assert ours.step == expected.step == 8
    for name in ours.names():
        torch.testing.assert_close(ours.weight(name), expected.weight(name), rtol=1e-4, atol=2e-5)
        for key, state in expected.optimizer_state(name).items():
            scale = state.abs().max().item()
            torch.testing.assert_close(ours.optimizer_state(name)[key], state, rtol=1e-4, atol=2e-5 * scale)


def test_optimizer_state_loads_from_a_plain_trainer_checkpoint(tmp_path):
    """Load the state through the optimizer's load_state_dict, as Lightning's own resume does."""
    seed_everything(3, verbose=False)
    module = fit(NanoGPT(**SIZES, dropout=0.0, optimizer="muon"), steps=2)
    module.trainer.save_checkpoint(tmp_path / "two.ckpt")
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(torch.load(tmp_path / "two.ckpt", weights_only=True)["optimizer_states"][0])
    first = module.trainer.optimizers[0]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    moved = []
    for o in (first, optimizer):
        with torch.no_grad():
            for name, p in module.model.named_parameters():
                p.copy_(before[name])
        o.step()
        moved.append({name: p.detach().clone() for name, p in module.model.named_parameters()})
    torch.testing.assert_close(*moved, rtol=0, atol=0)
    assert all((moved[0][name] - before[name]).abs().max() > 0 for name in before)
    assert math.isclose(float(optimizer.state[module.model.lm_head.weight]["step"]), 3)


@pytest.mark.parametrize(("run", "other"), [("uninterrupted", "adamw"), ("tiny_run", "muon")])
def test_resume_with_another_optimizer_is_refused(run, other, request, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([f"--resume={request.getfixturevalue(run)}", f"--optimizer={other}", "--max_steps=99"])
    out, err = capsys.readouterr()
    own = {"adamw": "muon", "muon": "adamw"}[other]
    assert stop.value.code == 2 and err.count("\n") == 1 and f"trained with --optimizer {own}, and" in err


def test_export_to_nanogpt_omits_muon_state(uninterrupted, tmp_path, capsys):
    evaluate.main([f"--checkpoint={last(uninterrupted)}", "--export=nanogpt", f"--out={tmp_path / 'out'}"])
    assert "state of muon is left out" in capsys.readouterr().err
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=False)
    assert "optimizer" not in content and content["iter_num"] == 8
