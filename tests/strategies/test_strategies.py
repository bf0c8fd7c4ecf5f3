"""Every strategy against a single process: initial weights, ties, decay groups, shards, recomputation, precision.

``tests/bench/test_parity.py`` compares losses and weights of the built-in models; this file those of a user's models.

Run as a script, this file is one rank: ``test_strategies.py FOLDER`` trains the command lines of ``FOLDER/runs.json``,
one after another, and records what it observes. One launch serves all tests of a strategy.
"""

import json
import math
import os
import sys
import weakref
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.strategies import STRATEGIES
from tests.launching import run_python

REPO = Path(__file__).parents[2]
RANKS = 2
STEPS = 3
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# Two user models with blocks, a tie and a matrix outside of any Linear; Applied can be built on the meta device.
USER_MODEL = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn

@dataclass
class Sizes:
    vocab_size: int
    block_size: int
    width: int = 32

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Mine(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.width)
        self.places = nn.Parameter(torch.randn(sizes.block_size, sizes.width) / 9)
        self.blocks = nn.Sequential(Block(sizes.width), Block(sizes.width))
        self.head = nn.Linear(sizes.width, sizes.vocab_size)
        self.head.weight = self.tokens.weight

    def forward(self, idx, targets=None):
        logits = self.head(self.blocks(self.tokens(idx) + self.places[: idx.size(1)]))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

class Applied(Mine):
    initialises_by_apply = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if module is self:
            nn.init.normal_(self.places, std=0.1)
            self.head.weight = self.tokens.weight
"""
N_LAYER = 4
# Three steps of decay take a seventh of a weight's norm, so that a wrongly decayed weight is far off.
COMMON = (
    f"--block_size=16 --max_steps={STEPS} --eval_interval={STEPS} --eval_batches=2 --logger=none --sample_tokens=0"
    " --accelerator=cpu --weight_decay=50 --learning_rate=1e-3 --min_learning_rate=1e-3 --warmup_steps=0"
).split()
GPT = [f"--n_layer={N_LAYER}", "--n_head=2", "--n_embd=64"]
MODELS = {
    "mingpt": ["--implementation=mingpt", *GPT, *(f"--{part}_pdrop=0" for part in ("embd", "resid", "attn"))],
    "nanogpt": ["--implementation=nanogpt", *GPT],
    "moderngpt": ["--implementation=moderngpt", *GPT, "--bigram=501", "--window=7", "--n_kv_head=1", "--smear=true"],
    "mine": ["--implementation=mine:Mine"],
    "applied": ["--implementation=mine:Applied"],
}
RECOMPUTED = ["mingpt", "nanogpt", "moderngpt", "mine"]
# FSDP2's mixed precision copies dataclass arguments of blocks; sampling checks that the cache is not copied.
SAMPLE = 4
REFERENCE_RUNS = {**MODELS, "alibi": [*MODELS["nanogpt"], "--position=alibi"]}
RUNS = {
    **REFERENCE_RUNS,
    "nanogpt": [*MODELS["nanogpt"], f"--sample_tokens={SAMPLE}"],
    **{f"{name} recompute": [*MODELS[name], "--recompute"] for name in RECOMPUTED},
    "dropout": [*MODELS["nanogpt"], "--dropout=0.2"],
    "dropout recompute": [*MODELS["nanogpt"], "--dropout=0.2", "--recompute"],
    "bf16": [*MODELS["nanogpt"], "--precision=bf16", f"--sample_tokens={SAMPLE}"],
}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
FILES = {
    "stage_2.json": {**dict.fromkeys(AUTO, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}},
    "stage_3.json": {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"},
    },
}
SHARDS_WEIGHTS = ("fsdp", "deepspeed_stage_3", "deepspeed_stage_3_offload")
FAST = ("fsdp", "deepspeed_stage_3")
MARKS = {name: [pytest.mark.slow] * (name not in FAST) for name in STRATEGIES if name != "auto"}
ROWS = [pytest.param(n, marks=[*m, *[needs_deepspeed] * STRATEGIES[n].deepspeed_engine]) for n, m in MARKS.items()]
every_row = pytest.mark.parametrize("strategy", ROWS)


class LiveBytes(TorchDispatchMode):
    """Measure the peak memory of the tensors allocated in this mode."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(is_traceable_wrapper_subclass(t) for t in tree_leaves((args, kwargs))):
            return NotImplemented  # DTensor then dispatches the op on its local shard
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.live)
        return out

    def freed(self, key):
        self.live -= self.sizes.pop(key)


def full(parameter):
    """Return a full copy of a parameter that may be sharded; a collective."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().float().clone()


def held(parameter):
    """Return the number of elements of a parameter that this rank holds."""
    if hasattr(parameter, "ds_id"):
        return max(parameter.numel(), parameter.ds_tensor.numel())
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


class Record(Callback):
    """Record what one rank observes in one run."""

    def __init__(self, *, compiled):
        self.compiled = compiled
        self.seen = SimpleNamespace(losses=[], forwards=0, forward_dtypes=set(), gathered=Counter())
        self.building = LiveBytes()
        self.building.__enter__()

    def setup(self, trainer, pl_module, stage):
        setup_strategy = trainer.strategy.setup

        def setup(*args):  # called right after configure_model
            self.building.__exit__(None, None, None)
            self.seen.peak = self.building.peak
            setup_strategy(*args)

        trainer.strategy.setup = setup

    def on_fit_start(self, trainer, pl_module):
        seen, model = self.seen, pl_module.model
        named = dict(model.named_parameters())
        seen.initial = {name: full(p) for name, p in named.items()}
        seen.held = {name: held(p) for name, p in named.items()}
        every = dict(model.named_parameters(remove_duplicate=False))
        seen.ties = {name for name, p in every.items() if any(p is q for n, q in every.items() if n != name)}
        seen.strategy, config = type(trainer.strategy).__name__, getattr(trainer.strategy, "config", {})
        seen.zero = config.get("zero_optimization", {})
        optimizer = trainer.optimizers[0]
        seen.optimizer = type(getattr(optimizer, "optimizer", optimizer)).__name__
        seen.groups = [(g["weight_decay"], sorted(g["param_names"])) for g in optimizer.param_groups]
        # DeepSpeed stores the parameters of each group beside its flat ones.
        taken = [g["params"] for g in optimizer.param_groups]
        taken = getattr(optimizer, "bit16_groups", getattr(optimizer, "fp16_groups", taken))
        seen.taken = [sorted(name for name, p in named.items() if any(p is q for q in group)) for group in taken]
        if not self.compiled:  # a hook inside a compiled block would break its graph
            unit = pl_module.implementation.block_class()
            block = next(m for m in model.modules() if isinstance(m, unit))
            first = next(m for m in block.modules() if dict(m.named_parameters(recurse=False)))
            first.register_forward_pre_hook(self.on_forward)

    def on_forward(self, module, args):
        self.seen.forwards += module.training
        self.seen.forward_dtypes.add(module.weight.dtype)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.losses.append(pl_module.step_loss.item())

    def on_train_end(self, trainer, pl_module):
        self.seen.kept = {name: held(p) for name, p in pl_module.model.named_parameters()}
        self.seen.final = {name: full(p) for name, p in pl_module.model.named_parameters()}
        self.seen.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def work(folder):
    """Train the command lines of a folder as one rank."""
    from lightning_gpt.cli import parse_train
    from lightning_gpt.training.run import train

    rank = os.environ.get("RANK", "0")
    all_gather, gathered = torch.distributed.all_gather_single, Counter()

    def counted(output, *args, **kwargs):
        gathered[output.dtype] += 1
        return all_gather(output, *args, **kwargs)

    torch.distributed.all_gather_single = counted  # FSDP2 gathers weights with this function
    for name, flags in json.loads((folder / "runs.json").read_text()).items():
        gathered.clear()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        record = Record(compiled="--compile" in flags)
        train(parse_train([*flags, f"--out_dir={folder / name}"]), callbacks=[record])
        record.seen.gathered.update(gathered)
        record.seen.checkpoint = folder / name / "checkpoints" / "last.ckpt"
        torch.save(vars(record.seen), folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="session")
def launch_runs(tmp_path_factory, text_file):
    """Return a function that runs command lines in one process group and returns the records by name and rank."""

    def launch(runs, *, ranks=RANKS):
        folder = tmp_path_factory.mktemp("group")
        (folder / "mine.py").write_text(USER_MODEL)
        batch = [f"--batch_size={8 // ranks}", f"--data={text_file}"]
        (folder / "runs.json").write_text(json.dumps({n: [*COMMON, *batch, *flags] for n, flags in runs.items()}))
        done = run_python(__file__, folder, ranks=ranks, env={"PYTHONPATH": f"{REPO}:{folder}"}, timeout=550)
        assert done.returncode == 0, done.stderr[-6000:]
        assert done.stdout.count("--- sample ---") == sum("--sample_tokens=4" in flags for flags in runs.values())
        files = {name: [folder / f"{name}-{rank}.pt" for rank in range(ranks)] for name in runs}
        return {n: [SimpleNamespace(**torch.load(f, weights_only=False)) for f in files[n]] for n in runs}

    return launch


@pytest.fixture(scope="session")
def reference(launch_runs):
    """Return the records of the runs in a single process, by name."""
    return {name: seen for name, [seen] in launch_runs(REFERENCE_RUNS, ranks=1).items()}


@pytest.fixture(scope="session")
def records(launch_runs, tmp_path_factory):
    """Return a function that returns the records of all runs under a strategy, launched on first use."""
    folder = tmp_path_factory.mktemp("files")
    for file, content in FILES.items():
        (folder / file).write_text(json.dumps(content))

    @cache
    def runs(strategy):
        runs = {name: [*flags, f"--strategy={strategy}"] for name, flags in RUNS.items()}
        if strategy == "deepspeed_stage_3":
            runs |= {file: [*MODELS["nanogpt"], f"--deepspeed_config={folder / file}"] for file in FILES}
        return launch_runs(runs)

    return runs


def mean_losses(ranks):
    return [sum(losses) / len(ranks) for losses in zip(*(seen.losses for seen in ranks), strict=True)]


def expected_std(name):
    """Return the standard deviation of initial weights by the formula; None for constants."""
    if name.endswith("bias") or ".ln_" in name:
        return None
    return 0.02 / math.sqrt(2 * N_LAYER) if name.endswith("c_proj.weight") else 0.02


@every_row
@pytest.mark.parametrize("model", MODELS)
def test_initial_weights_equal_single_process(records, reference, strategy, model):
    for seen in records(strategy)[model]:
        assert seen.initial.keys() == reference[model].initial.keys()
        for name, weight in reference[model].initial.items():
            assert torch.equal(seen.initial[name], weight), name


@pytest.mark.parametrize("model", ["mingpt", "nanogpt"])
def test_initial_weights_match_closed_form(reference, model):
    for name, weight in reference[model].initial.items():
        std = expected_std(name)
        if std is None:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            error = 1 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(std, rel=4 * error), name
            assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name


@every_row
@pytest.mark.parametrize("model", MODELS)
def test_tied_weights_are_one_parameter(records, strategy, model):
    head = {"mingpt": set(), "moderngpt": set(), "nanogpt": {"lm_head.weight", "transformer.wte.weight"}}
    assert all(seen.ties == head.get(model, {"head.weight", "tokens.weight"}) for seen in records(strategy)[model])


def decays(model, name):
    """Return whether weight decay applies to a parameter, by its name."""
    if model in ("mingpt", "moderngpt"):
        return name.endswith("weight") and not any(part in name for part in (".ln_", "wte", "wpe", "bigram"))
    return name.endswith(("weight", "places")) and ".ln_" not in name


@every_row
@pytest.mark.parametrize("model", MODELS)
def test_decay_groups_by_name(records, reference, strategy, model):
    names = reference[model].initial.keys()
    decayed = sorted(name for name in names if decays(model, name))
    rest = sorted(name for name in names if not decays(model, name))
    for seen in records(strategy)[model]:
        assert seen.groups == [(50, decayed), (0, rest)] and seen.taken == [decayed, rest]


@every_row
@pytest.mark.parametrize("model", ["mine", "applied", "alibi"])
def test_training_equals_single_process(records, reference, strategy, model):
    """Compare the losses of three steps, and the final weights, which depend on decay and clipping."""
    ranks = records(strategy)[model]
    assert mean_losses(ranks) == pytest.approx(reference[model].losses, rel=1e-4)
    assert len(reference[model].losses) == STEPS
    for name, weight in reference[model].final.items():
        if reference[model].initial[name].any():  # weights that start at 0 are dominated by noise
            distance = (ranks[0].final[name] - weight).norm() / weight.norm()
            assert distance < 0.02, name


@every_row
@pytest.mark.parametrize("model", RECOMPUTED)
def test_recompute_runs_each_block_twice(records, reference, strategy, model):
    kept, recomputed = records(strategy)[model], records(strategy)[f"{model} recompute"]
    assert mean_losses(recomputed) == pytest.approx(mean_losses(kept), rel=1e-6)
    assert [seen.forwards for seen in (*kept, *recomputed)] == [STEPS, STEPS, 2 * STEPS, 2 * STEPS]


@every_row
def test_recompute_repeats_dropout(records, strategy):
    kept, recomputed = records(strategy)["dropout"], records(strategy)["dropout recompute"]
    assert mean_losses(kept) != pytest.approx(mean_losses(records(strategy)["nanogpt"]), rel=1e-4)
    assert mean_losses(recomputed) == pytest.approx(mean_losses(kept), rel=1e-6)


@every_row
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_sharded_by_sharding_strategies(records, reference, strategy, model):
    for seen in records(strategy)[model]:
        for name, weight in reference[model].initial.items():
            if strategy in SHARDS_WEIGHTS:
                assert seen.held[name] <= -(-weight.numel() // RANKS) + weight.numel() // len(weight), name
            else:
                assert seen.held[name] == weight.numel(), name


@pytest.mark.parametrize("strategy", [row for row in ROWS if row.values[0] in SHARDS_WEIGHTS])
@pytest.mark.parametrize("model", ["mingpt", "nanogpt"])
def test_no_rank_holds_the_whole_model_while_building(records, reference, strategy, model):
    """Bound the peak: a rank holds its shards and some copies of one module, at most an eighth of a block."""
    weights = 4 * sum(w.numel() for w in reference[model].initial.values())
    assert reference[model].peak >= weights
    for seen in records(strategy)[model]:
        assert weights / RANKS < seen.peak < 0.85 * weights


@every_row
def test_bf16_weights_are_gathered_in_bf16(records, reference, strategy):
    runs = records(strategy)
    half, full = {torch.bfloat16}, {torch.float32}
    casts = strategy != "ddp"  # under DDP and in one process, autocast casts per operation
    for seen, single in zip(runs["bf16"], runs["nanogpt"], strict=True):
        assert single.forward_dtypes == full and seen.forward_dtypes == (half if casts else full)
        if strategy == "fsdp":
            assert set(single.gathered) == full and set(seen.gathered) == half
            assert seen.gathered[torch.bfloat16] == single.gathered[torch.float32] > STEPS * N_LAYER
    assert mean_losses(runs["bf16"]) == pytest.approx(reference["nanogpt"].losses, rel=2e-2)


@every_row
def test_strategy_and_optimizer_match_the_row(records, strategy):
    kind = {"ddp": "DDPStrategy", "fsdp": "FSDP"}.get(strategy, "DeepSpeed")
    offload = strategy.endswith("offload")
    for seen in records(strategy)["mingpt"]:
        assert seen.strategy == kind
        assert seen.optimizer == ("DeepSpeedCPUAdam" if offload else "AdamW")
        if kind == "DeepSpeed":
            assert f"deepspeed_stage_{seen.zero['stage']}" == strategy.removesuffix("_offload")
            assert ("offload_optimizer" in seen.zero) == offload


@needs_deepspeed
@pytest.mark.parametrize("file", [pytest.param(file, id=f"{file}-deepspeed_stage_3") for file in FILES])
def test_deepspeed_config_is_used(records, reference, file):
    """Check the stage and the threshold: stage 3 shards small weights, too, which it keeps whole by default."""
    ranks, wanted = records("deepspeed_stage_3")[file], FILES[file]["zero_optimization"]
    assert mean_losses(ranks) == pytest.approx(reference["nanogpt"].losses, rel=1e-4)
    for seen in ranks:
        assert (seen.strategy, seen.zero["stage"]) == ("DeepSpeed", wanted["stage"])
        total, kept = (sum(counts.values()) for counts in (seen.held, seen.kept))
        assert kept == total
        assert kept == sum(w.numel() for w in reference["nanogpt"].initial.values()) // (wanted["stage"] - 1)


@pytest.mark.slow
@every_row
def test_compiled_blocks_train_as_eager_ones(launch_runs, records, strategy):
    """Compare losses and checkpoint keys of models, and of one with recomputation."""
    # Another model where hooks gather the weights of compiled blocks; elsewhere blocks compute as in a single process.
    more = {"fsdp": ["mine"], "deepspeed_stage_3": ["moderngpt"]}
    names = [*more.get(strategy, []), "nanogpt recompute"]
    # Inductor takes a minute, so it compiles under one strategy; the others capture and differentiate alike.
    flags = [f"--strategy={strategy}", f"--compile={'inductor' if strategy == 'fsdp' else 'aot_eager'}"]
    compiled = launch_runs({name: [*RUNS[name], *flags] for name in names})
    for name in names:
        eager, fast = records(strategy)[name], compiled[name]
        assert mean_losses(fast) == pytest.approx(mean_losses(eager), rel=1e-4)
        assert eager[0].graphs == 0 and fast[0].graphs > 0
        shapes = open_checkpoint(fast[0].checkpoint).shapes()
        assert shapes == open_checkpoint(eager[0].checkpoint).shapes() and set(eager[0].initial) <= shapes.keys()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
