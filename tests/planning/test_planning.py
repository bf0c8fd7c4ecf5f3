"""Compare the plan of --dry_run with the memory of real training. As a script, this file is one measuring rank."""

import ctypes
import dataclasses
import gc
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.models import FORMS, GPTModule
from lightning_gpt.planning import Plan, Traces, flops_per_token, plan
from lightning_gpt.strategies import STRATEGIES, device_arguments
from lightning_gpt.strategies.deepspeed import zero_rules
from lightning_gpt.strategies.memory import MemoryRules
from tests.launching import run_python

REPO = Path(__file__).parents[2]
SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 384, "vocab_size": 256, "block_size": 128}
BATCH_SIZE = 6  # with these sizes activations take about three times the memory of the weights
DEEPSPEED = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is both planned and measured."""

    strategy: str = "auto"
    implementation: str = "mingpt"
    optimizer: str = "adamw"
    precision: str = "32-true"
    dropout: float = 0.0
    recompute: bool = False
    accumulate: int = 1
    bucket: int = 9_000_000  # elements; DeepSpeed's default of 200 million would exceed everything else

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "auto" else 2

    @property
    def fields(self) -> dict[str, int | float]:
        names = ("dropout",) if self.implementation == "nanogpt" else ("embd_pdrop", "resid_pdrop", "attn_pdrop")
        return SIZES | dict.fromkeys(names, self.dropout)

    @property
    def rules(self) -> MemoryRules:
        rules = STRATEGIES[self.strategy].memory
        return dataclasses.replace(rules, bucket=self.bucket) if hasattr(rules, "bucket") else rules


def _plan(case: Case, *, fields: dict[str, int | float] | None = None, **changes) -> Plan:
    fields = case.fields | (fields or {})
    module = GPTModule.without_memory(case.implementation, model_config=fields, optimizer=case.optimizer)
    given = {
        "rules": case.rules,
        "world_size": case.ranks,
        "devices_per_node": case.ranks,
        "batch_size": BATCH_SIZE,
        "steps": 3,
        "recompute": case.recompute,
    }
    traced = {
        "block_size": fields["block_size"],
        "accumulate": case.accumulate,
        "precision": case.precision,
        "device_type": changes.pop("device_type", "cpu"),
    }
    return plan(Traces(module, **traced), **given | changes)


def _measured(case: Case, tmp_path: Path) -> tuple[int, int]:
    """Return the bytes that rank 0 holds between two steps, and their peak within a step."""
    out = tmp_path / "measured.json"
    command = [__file__, json.dumps(dataclasses.asdict(case)), out]
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    done = run_python(*command, ranks=case.ranks, env=env, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    resident, peak = json.loads(out.read_text())
    return resident, peak


def _check(case: Case, tmp_path: Path) -> None:
    resident, peak = _measured(case, tmp_path)
    memory = _plan(case).memory
    planned, planned_peak = memory.resident + memory.host_resident, memory.peak + memory.host_peak
    print(f"{case}: resident {planned / 1e6:.1f} planned {resident / 1e6:.1f} measured MB,", end=" ")
    print(f"peak {planned_peak / 1e6:.1f} planned {peak / 1e6:.1f} measured MB")
    assert planned == pytest.approx(resident, rel=0.1)
    assert planned_peak == pytest.approx(peak, rel=0.1)
    # Also compare the difference, because the larger numbers would hide an error in it.
    assert planned_peak - planned == pytest.approx(peak - resident, rel=0.1)
    if case.strategy not in ("auto", "ddp"):
        # Check that a plan without sharding would fail.
        whole = _plan(case, world_size=1).memory
        assert whole.resident + whole.host_resident != pytest.approx(resident, rel=0.1)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(recompute=True, dropout=0.1, accumulate=2), Case(optimizer="muon")],
    ids=["plain", "recompute-dropout-accumulate", "muon"],
)
def test_plan_matches_measurement_on_a_single_device(case, tmp_path):
    _check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(precision="bf16-mixed"), Case(implementation="nanogpt", dropout=0.1)], ids=str)
def test_plan_matches_measurement_on_a_single_device_slow(case, tmp_path):
    _check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("fsdp", "muon"), *((name, "adamw") for name in ("ddp", "fsdp", *DEEPSPEED))]
)
def test_plan_matches_measurement_on_two_ranks(strategy, optimizer, tmp_path):
    if strategy in DEEPSPEED:
        pytest.importorskip("deepspeed")
    _check(Case(strategy=strategy, optimizer=optimizer), tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of this process is read from /proc")
def test_planning_a_large_model_allocates_nothing():
    """Plan with an address space that has room for less than one layer."""
    large = {"n_layer": 56, "n_head": 16, "n_embd": 8192, "vocab_size": 50304, "block_size": 1024}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500 * 2**20, hard))
    try:
        with pytest.raises((RuntimeError, MemoryError)):  # a single layer does not fit
            torch.empty(12 * 8192**2)
        planned = _plan(Case(strategy="fsdp"), fields=large, world_size=64, devices_per_node=8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert planned.parameters == 12 * 56 * 8192**2 + 13 * 56 * 8192 + 2 * 8192 + (2 * 50304 + 1024) * 8192
    assert planned.memory.weights == -(-planned.parameters // 64) * 4
    assert planned.tokens_per_step == BATCH_SIZE * 1024 * 64
    assert planned.flops_per_step == pytest.approx(6 * planned.parameters * planned.tokens_per_step, rel=0.05)


def test_muon_stores_one_moment_for_hidden_matrices():
    adamw, muon = (_plan(Case(optimizer=name)).memory for name in ("adamw", "muon"))
    hidden = SIZES["n_layer"] * 12 * SIZES["n_embd"] ** 2
    assert adamw.optimizer - muon.optimizer == pytest.approx(4 * hidden, rel=1e-4)  # AdamW also stores its step counts


def test_recomputation_reduces_activations():
    kept, recomputed = (_plan(Case(recompute=r), fields={"n_layer": 12}).memory.activations for r in (False, True))
    assert recomputed < kept / 4
    assert _plan(Case(recompute=True)).flops_per_step == _plan(Case()).flops_per_step, (
        "MFU does not count recomputation"
    )


def test_attention_with_dropout_stores_no_probabilities_on_a_gpu():
    cpu, cuda = (
        _plan(Case(dropout=0.1), fields={"block_size": 512}, device_type=d).memory.activations for d in ("cpu", "cuda")
    )
    assert cpu - cuda > BATCH_SIZE * 4 * 512**2 * 4 * SIZES["n_layer"]  # a (B, n_head, T, T) tensor per layer


@pytest.mark.parametrize(
    ("implementation", "fields", "tensors"),
    [
        # Two dropouts in each block keep a byte per element instead of one in bf16.
        ("nanogpt", {"dropout": 0.1, "attention": "sdpa"}, 1),
        # RMSNorm's intermediate results are not kept: two bf16 tensors are those of queries and keys.
        ("moderngpt", {"dropout": 0.0}, 2),
    ],
)
def test_kernels_of_a_gpu_keep_less(implementation, fields, tensors):
    sizes = {"block_size": 64, **fields}
    case = Case(implementation=implementation, precision="bf16-mixed")
    cpu, cuda = (_kept(case, sizes, device_type=device) for device in ("cpu", "cuda"))
    assert cpu - cuda >= 0.9 * tensors * SIZES["n_layer"] * BATCH_SIZE * 64 * SIZES["n_embd"] * 2


def _kept(case: Case, fields: dict[str, int | float | str], *, device_type: str) -> int:
    module = GPTModule.without_memory(case.implementation, model_config=SIZES | fields, optimizer="adamw")
    traces = Traces(module, block_size=64, accumulate=1, precision=case.precision, device_type=device_type)
    return traces.step(case.rules, batch_size=BATCH_SIZE, recompute=False).forward[-1].activations


def test_offloading_moves_the_optimizer_to_the_host():
    here, offloaded = (_plan(Case(strategy=f"deepspeed_stage_2{o}"), devices_per_node=4) for o in ("", "_offload"))
    assert here.host == 0 and here.memory.optimizer > 0
    assert offloaded.memory.optimizer == 0 and offloaded.host > 4 * here.memory.optimizer
    assert "host" in offloaded.table() and "host" not in here.table()


def test_offloading_the_optimizer_alone_leaves_the_weights_on_the_device():
    def planned(**zero):
        config = {"zero_optimization": {"stage": 3} | {name: {"device": "cpu"} for name in zero}}
        return _plan(Case(strategy="deepspeed_stage_3"), rules=zero_rules(config))

    here, optimizer = planned(), planned(offload_optimizer=True)
    weights, both = planned(offload_param=True), planned(offload_optimizer=True, offload_param=True)
    assert optimizer.memory.weights == here.memory.weights > both.memory.weights == weights.memory.weights
    assert weights.memory.optimizer == here.memory.optimizer > both.memory.optimizer == optimizer.memory.optimizer == 0
    shards = here.memory.weights - both.memory.weights
    assert both.host - optimizer.host == weights.host == 2 * shards  # two ranks
    assert optimizer.memory.peak - both.memory.peak == shards


def test_table_lists_all_parts_and_its_source():
    table = _plan(Case()).table()
    for text in ("parameters      7,344,384", "weights         28.0 MiB", "optimizer       56.0 MiB", "1910.02054"):
        assert text in table
    assert table.isascii() and all(len(line) < 200 for line in table.splitlines())


def test_flops_count_a_tied_head_once_and_skip_positions():
    from lightning_gpt.implementations.registry import get_implementation

    model = get_implementation("nanogpt").build(Case(implementation="nanogpt").fields, meta=True)
    n = sum(p.numel() for p in model.parameters()) - 128 * 384
    assert flops_per_token(model, block_size=128) == 6 * n + 12 * 4 * 384 * 128


def test_plan_refuses_a_model_that_reads_values(tmp_path, monkeypatch):
    (tmp_path / "nosy.py").write_text(
        "from dataclasses import dataclass\nimport torch\n"
        "@dataclass\nclass Config:\n    vocab_size: int = 8\n    block_size: int = 8\n"
        "class Nosy(torch.nn.Module):\n"
        "    def __init__(self, config: Config):\n"
        "        super().__init__()\n        self.wte = torch.nn.Embedding(8, 8)\n"
        "    def forward(self, idx, targets=None):\n"
        "        loss = self.wte(idx).sum()\n        print(loss.item())\n        return loss, loss\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = GPTModule("nosy:Nosy", model_config={"vocab_size": 8, "block_size": 8})
    with pytest.raises(UserError, match="--dry_run cannot run --implementation nosy:Nosy") as caught:
        plan(
            Traces(module, block_size=8, accumulate=1, precision="32-true", device_type="cpu"),
            rules=STRATEGIES["auto"].memory,
            world_size=1,
            devices_per_node=1,
            batch_size=1,
            steps=1,
            recompute=False,
        )
    assert "\n" not in str(caught.value)


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def measure(case: Case, out: Path) -> None:
    """Train for three steps, and write the bytes that malloc had allocated in the third to `out`.

    malloc allocates large blocks with mmap and counts them separately. The count includes all large tensors, in
    whichever thread they are freed; torch.profiler misses those that gloo's threads free.
    """
    from lightning import Callback, Trainer
    from torch.utils._python_dispatch import TorchDispatchMode

    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo
    libc.mallopt(-3, 32 * 1024)  # M_MMAP_THRESHOLD; setting it turns its dynamic adjustment off
    row = STRATEGIES[case.strategy]
    options = TrainerOptions(
        strategy=case.strategy, accelerator="cpu", devices=case.ranks, precision=case.precision.removesuffix("-true")
    )
    arguments = device_arguments(options)
    if "deepspeed" in case.strategy:
        arguments["strategy"].config["zero_optimization"]["reduce_bucket_size"] = case.bucket
        arguments["strategy"].config["zero_optimization"]["allgather_bucket_size"] = case.bucket
    tokens = torch.randint(0, SIZES["vocab_size"], (3 * case.accumulate * case.ranks * BATCH_SIZE, SIZES["block_size"]))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, tokens), batch_size=BATCH_SIZE)
    # Warm up: the math libraries allocate buffers on their first call, which the plan does not count.
    first = GPTModule(case.implementation, model_config=case.fields | {"n_layer": 1}, recompute=case.recompute)
    mixed = case.precision == "bf16-mixed"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        loss = first(tokens[:BATCH_SIZE], tokens[:BATCH_SIZE])[1]
    loss.backward()
    optimizer = first.build_optimizer([{"params": list(first.parameters())}])
    optimizer.step()
    del first, loss, optimizer
    gc.collect()
    base = libc.mallinfo2().hblkhd
    readings: list[int] = []
    third: list[int] = []  # indices in `readings` where the third step begins and ends

    class Reader(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            readings.append(libc.mallinfo2().hblkhd - base)
            return out

    class Steps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2 * case.accumulate:
                third.append(len(readings))
                readings.append(libc.mallinfo2().hblkhd - base)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3 * case.accumulate - 1:
                third.append(len(readings))

    with Reader():
        module = FORMS[row.form](
            case.implementation,
            model_config=case.fields,
            optimizer=case.optimizer,
            recompute=case.recompute,
            **row.form_options,
        )
        Trainer(
            **arguments,
            max_steps=3,
            accumulate_grad_batches=case.accumulate,
            gradient_clip_val=1.0,
            callbacks=[Steps()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(module, data)
    begin, end = third
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps([readings[begin], max(readings[begin:end])]))


if __name__ == "__main__":
    measure(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]))
