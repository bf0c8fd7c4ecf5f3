"""The steps of ``bench.py gpu``, each a function that yields checks. On a CPU they try the code on small models."""

import contextlib
import copy
import gc
import io
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from lightning_gpt.bench.gpu_runs import (
    accelerator_of,
    device_flags,
    gibibytes,
    large_model,
    median_seconds,
    planned_peak,
    printed_by_training,
    write_text,
)
from lightning_gpt.bench.tax import measure_tax
from lightning_gpt.checkpoint import load, open_checkpoint
from lightning_gpt.checksums import verify_checksums
from lightning_gpt.cli import parse_sample
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.implementations.registry import get_implementation, refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.sampling import write_samples
from lightning_gpt.strategies import STRATEGIES
from lightning_gpt.strategies.devices import device_time

_TINY = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=4 --eval_batches=2 --eval_interval=10"
    " --max_steps=20 --log_every_n_steps=5 --sample_tokens=8 --logger=csv --trainer.enable_progress_bar=false"
).split()
_UNLOGGED_STEP = 13  # neither logged nor validated nor saved
_LOSS_AFTER_200_STEPS = 2.7  # of the standard library's text; 4.6 is the loss of a guess


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        step: Name of the step.
        name: What was looked at.
        value: What was found.
        asked: What it should be.
        passed: Whether it is so; None for what is only recorded.
    """

    step: str
    name: str
    value: str
    asked: str = ""
    passed: bool | None = None

    @property
    def verdict(self) -> str:
        """The check in a word."""
        return {None: "", True: "pass", False: "FAIL"}[self.passed]


Found = Iterator[tuple[str, str, str, bool | None]]  # name, value, asked, passed


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        function: Yields what it finds on a device.
        seconds: Its time limit.
        timed: Whether it measures times, and so must run alone.
    """

    function: Callable[[torch.device], Found]
    seconds: float
    timed: bool = False


def main() -> None:
    """Run the step that the command line names, on a device, and write its checks to a file as they come."""
    name, device, file = sys.argv[1:]
    with Path(file).open("a", encoding="utf-8") as out:
        for found in STEPS[name].function(torch.device(device)):
            out.write(json.dumps(asdict(Check(name, *found))) + "\n")
            out.flush()


# Facts


def _facts(device: torch.device) -> Found:
    """Name the card, the versions, and the attention kernel that torch chooses for each case."""
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}", "", None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        yield "card", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}", "", None
        yield "bfloat16", str(torch.cuda.is_bf16_supported(including_emulation=False)), "", None
    q = torch.zeros(2, 4, 64, 32, device=device, dtype=torch.bfloat16)
    mask = torch.ones(64, 64, dtype=torch.bool, device=device).tril()
    cases: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "causal with dropout": {"is_causal": True, "dropout_p": 0.1},
        "mask": {"attn_mask": mask},
        "one query": {"query": q[:, :, :1]},
    }
    for name, arguments in cases.items():
        number = torch._fused_sdp_choice(*[arguments.pop("query", q), q, q], **arguments)
        yield f"attention, {name}", torch.nn.attention.SDPBackend(number).name, "", None


# Numerics

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mingpt": ("mingpt", {}),
    "nanogpt": ("nanogpt", {}),
    "nanogpt, ALiBi": ("nanogpt", {"position": "alibi"}),
    "nanogpt, manual attention": ("nanogpt", {"attention": "manual"}),
    "moderngpt": ("moderngpt", {}),
    "moderngpt, all options": ("moderngpt", {"window": 9, "bigram": 501, "smear": True, "n_kv_head": 1}),
}
# Relative deviations of the loss and of the gradients from float32 on the CPU.
_TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (5e-3, 5e-2)}


def _numerics(device: torch.device) -> Found:
    """Compare loss and gradients with those of the CPU in float32."""
    torch.set_float32_matmul_precision("highest")
    for label, (name, fields) in _MODELS.items():
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 101}
        model = get_implementation(name).build(sizes | fields).eval()
        tokens = torch.randint(101, (4, 33))
        loss, gradients = _loss_and_gradients(model, tokens, torch.device("cpu"), torch.float32)
        for dtype, (most_loss, most_gradients) in _TOLERANCES.items():
            if device.type == "cpu" and dtype == torch.float16:
                continue
            theirs = _loss_and_gradients(model, tokens, device, dtype)
            off = abs(theirs[0] / loss - 1), float((theirs[1] - gradients).norm() / gradients.norm())
            passed = off[0] <= most_loss and off[1] <= most_gradients
            value = f"loss {off[0]:.1e}, gradients {off[1]:.1e}"
            yield f"{label}, {str(dtype)[6:]}", value, f"{most_loss:.0e}, {most_gradients:.0e}", passed


def _loss_and_gradients(
    model: nn.Module, tokens: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor]:
    model, tokens = copy.deepcopy(model).to(device), tokens.to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])


def _optimizers(device: torch.device) -> Found:
    """Compare the losses of five steps from the same weights with those of the CPU, in float32."""
    text = write_text()
    start = [*_TINY, f"--data={text}", "--sample_tokens=0", "--precision=32-true", "--tf32=false", "--dropout=0"]
    start += ["--implementation=nanogpt"]
    printed_by_training([*start, "--max_steps=1", "--accelerator=cpu", "--out_dir=start"])
    for optimizer in ("adamw", "muon"):
        losses: list[float] = []
        for where in (torch.device("cpu"), device):
            flags = [*start, "--init_from=start", f"--optimizer={optimizer}", "--max_steps=5", "--log_every_n_steps=1"]
            out = f"--out_dir={optimizer}-{len(losses)}"
            printed = printed_by_training([*flags, *device_flags(where), out, "--eval_interval=5", "--overwrite"])
            losses.append(float(re.findall(r"step 5: .*val_loss ([\d.]+|nan)", printed)[-1]))
        off = abs(losses[1] / losses[0] - 1)
        yield f"{optimizer}, loss after 5 steps", f"{losses[1]:.4f}, CPU {losses[0]:.4f}", "1e-2", off <= 1e-2


# Whole commands


@contextlib.contextmanager
def waits_for_device() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how often torch has noticed a wait for the device in this context."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which also warns, once, that it is a prototype
        try:
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class SyncCount(Callback):
    """Count the waits for the device that torch notices in one step, to the beginning of the next."""

    def __init__(self) -> None:
        self.count: int | None = None
        self._stack = contextlib.ExitStack()
        self._waits: Callable[[], int] | None = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin or end the count."""
        if self._waits is not None:
            self.count, self._waits = self._waits(), None
            self._stack.close()
        elif trainer.global_step == _UNLOGGED_STEP - 1 and torch.cuda.is_available() and self.count is None:
            self._waits = self._stack.enter_context(waits_for_device())


def _whole(device: torch.device, *, strategy: str) -> Found:
    """Train, validate, save, resume and sample in each precision, and count the waits of a step that is not logged."""
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        yield strategy, "DeepSpeed is not installed", "", None
        return
    text = write_text()
    for precision in ("32", "bf16", "16") if device.type == "cuda" else ("32", "bf16"):
        if precision == "16" and "16-mixed" not in STRATEGIES[strategy].precisions:
            continue
        run, count = f"run-{precision}", SyncCount()
        flags = [*_TINY, f"--data={text}", f"--out_dir={run}", f"--strategy={strategy}", f"--precision={precision}"]
        flags += ["--implementation=nanogpt", *device_flags(device)]
        name = f"{strategy}, {precision}"
        try:
            printed = printed_by_training(flags, callback=count)
            printed += printed_by_training([f"--resume={run}", "--max_steps=24"])
            options = [f"--checkpoint={run}", "--prompt=bottles", "--max_new_tokens=8"]
            with contextlib.redirect_stderr(io.StringIO()):
                write_samples(parse_sample([*options, f"--accelerator={accelerator_of(device)}"]), out=io.StringIO())
        except (Exception, SystemExit) as error:
            yield name, f"{type(error).__name__}: {error}".replace("\n", " ")[:200], "works", False
            continue
        losses = re.findall(r"val_loss (\S+)", printed)
        yield name, f"val_loss {losses[-1]}", "finite", losses[-1] not in ("nan", "inf")
        if count.count is not None:
            free = "16" not in precision.replace("bf16", "") and not strategy.startswith("deepspeed")
            yield f"{name}, waits per step", str(count.count), "0" if free else "", count.count == 0 if free else None


def _speed(device: torch.device, *, implementation: str) -> Found:
    """Train the 124M size on 16 x 1024 tokens in bf16, eager and on a GPU also compiled: speed, and peak memory."""
    flags = [*large_model(device), *device_flags(device), f"--implementation={implementation}", "--precision=bf16"]
    flags += ["--logger=none", "--sample_tokens=0", "--max_steps=30", "--eval_interval=30", "--eval_batches=1"]
    flags += ["--log_every_n_steps=10"]
    plan = printed_by_training([*flags, "--dry_run"])
    planned = planned_peak(plan)
    milliseconds = re.search(r"time +([\d.,]+) ms per step", plan)  # None for a card without a data sheet
    for compiled in (False, True) if device.type == "cuda" else (False,):
        name = f"{implementation}{', compiled' * compiled}"
        gc.collect()  # a model holds references to itself
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the peak of this run, not of the one before
        printed = printed_by_training([*flags, *["--compile"] * compiled, f"--out_dir=run-{compiled}"])
        shown = " ".join(re.findall(r"speed +(.*), peak memory", printed))
        yield name, shown + (f" (planned {milliseconds[1]} without --compile)" if milliseconds else ""), "", None
        if device.type == "cuda":
            peak = gibibytes(printed, r"peak memory ([\d.,]+) (MiB|GiB)")
            value, off = f"{peak:.2f} GiB, planned {planned:.2f}", planned / peak - 1
            yield f"{name}, peak memory", value, "within 5 %", abs(off) <= 0.05


def _loop(device: torch.device) -> Found:
    """Time steps of train.py and of a hand-written loop in turns, eager and on a GPU also compiled."""
    on_gpu = device.type == "cuda"
    rounds, steps = (2, 100) if on_gpu else (1, 1)
    for compiled in (False, True) if on_gpu else (False,):
        tax = measure_tax(rounds=rounds, steps=steps, compile=compiled)
        ratio = statistics.median(tax.ratios)
        shown = ", ".join(f"{name} {statistics.median(t.ms_per_step):.2f} ms" for name, t in tax.paths.items())
        name = f"train.py to a loop{', compiled' if compiled else ''}"
        yield name, f"{ratio:.3f} ({shown})", "1.05", ratio <= 1.05 if on_gpu else None


def _kernels(device: torch.device) -> Found:
    """Time float32 products with and without TF32, and forward and backward passes with windows and with ALiBi."""
    size = 4096 if device.type == "cuda" else 64
    a = torch.randn(size, size, device=device)
    times = {}
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        times[setting] = median_seconds(lambda: a @ a, device)
    yield "TF32, speed of a product", f"{times['highest'] / times['high']:.2f} times", "", None
    sizes = {"n_layer": 4, "n_head": 6, "n_embd": 384, "vocab_size": 101}
    sizes |= {"block_size": 1024 if device.type == "cuda" else 32}
    for name, fields in (("nanogpt", {"position": "alibi"}), ("moderngpt", {"window": sizes["block_size"] // 4})):
        seconds = []
        for extra in ({}, fields):
            model = get_implementation(name).build(sizes | extra).to(device)
            reason, _ = refused_by(model, device_type=device.type, dtype=torch.bfloat16)
            if reason:
                yield f"{name}, {extra}", reason, "", None
                break
            tokens = torch.randint(101, (8, sizes["block_size"] + 1), device=device)

            def step(model: nn.Module = model, tokens: Tensor = tokens) -> None:
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    model(tokens[:, :-1], tokens[:, 1:])[1].backward()

            seconds.append(median_seconds(step, device))
        else:
            yield f"{name}, {fields}", f"{seconds[1] / seconds[0]:.2f} times the plain step", "", None


def _decoding(device: torch.device) -> Found:
    """Generate with 1 and 16 rows, compiled or not, and count the waits for the device."""
    fields = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
    if device.type == "cpu":
        fields |= {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 64, "vocab_size": 101}
    new = 64 if device.type == "cuda" else 8
    settings = GenerationSettings(max_new_tokens=new, top_k=50)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        module = GPTModule("nanogpt", model_config=fields).to(device, torch.bfloat16).eval()
        module.compile_generation(compiled)
        for rows in (1, 16):
            name = f"{rows} row{'s' * (rows > 1)}{', compiled' * compiled}"

            def generate(rows: int = rows, module: GPTModule = module) -> None:
                for _ in module.stream_tokens([[1, 2, 3]] * rows, settings):
                    pass

            generate()
            start = device_time(device)
            generate()
            yield name, f"{rows * new / (device_time(device) - start):,.0f} tokens/s", "", None
            if device.type == "cuda":
                with waits_for_device() as waits:
                    generate()
                per_token = waits() / new
                yield f"{name}, waits per token", f"{per_token:.2f}", "1", per_token <= 1.05


def _checkpoints(device: torch.device) -> Found:
    """Time saving, verifying and loading a checkpoint of the 124M size."""
    seconds: list[float] = []

    class Save(Callback):
        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            start = time.perf_counter()
            trainer.save_checkpoint("again.ckpt")
            seconds.append(time.perf_counter() - start)

    flags = [
        *large_model(device),
        *device_flags(device),
        "--implementation=nanogpt",
        "--logger=none",
        "--sample_tokens=0",
    ]
    printed_by_training([*flags, "--max_steps=1", "--eval_batches=1", "--out_dir=run"], callback=Save())
    file = Path("again.ckpt")
    yield "save", f"{seconds[0]:.2f} s, {file.stat().st_size / 2**30:.2f} GiB", "", None
    start = time.perf_counter()
    verify_checksums(file)
    yield "verify", f"{time.perf_counter() - start:.2f} s", "", None
    start = time.perf_counter()
    module, _ = load(file)
    yield "load", f"{time.perf_counter() - start:.2f} s", "", None
    same = open_checkpoint(file).hash() == open_checkpoint(Path("run/checkpoints/last.ckpt")).hash()
    yield "the same weights as the run's own", str(same), "True", same


def _learning(device: torch.device) -> Found:
    """Train 200 steps on the standard library's text."""
    steps, most = (200, _LOSS_AFTER_200_STEPS) if device.type == "cuda" else (2, 9.0)
    flags = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64", "--batch_size=64", "--sample_tokens=0"]
    printed = printed_by_training(
        [*flags, *device_flags(device), f"--max_steps={steps}", "--eval_batches=20", "--out_dir=run"]
    )
    loss = float(re.findall(r"val_loss (\S+)", printed)[-1])
    yield f"loss after {steps} steps", f"{loss:.4f}", f"below {most}", loss < most


_STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
STEPS = {
    "facts": Step(_facts, 60),
    "numerics": Step(_numerics, 120),
    "optimizers": Step(_optimizers, 120),
    # DeepSpeed's first step compiles FusedAdam.
    **{f"whole_{name}": Step(partial(_whole, strategy=name), 240) for name in _STRATEGIES},
    **{
        f"speed_{name}": Step(partial(_speed, implementation=name), 120, timed=True)
        for name in ("nanogpt", "mingpt", "moderngpt")
    },
    "loop": Step(_loop, 120, timed=True),
    "kernels": Step(_kernels, 60, timed=True),
    "decoding": Step(_decoding, 120, timed=True),
    "checkpoints": Step(_checkpoints, 60, timed=True),
    "learning": Step(_learning, 60),
}
