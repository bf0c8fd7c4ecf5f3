"""How fast text is written on a CPU: beside the originals' loop, beside Hugging Face, and beside what memory allows."""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gpt.benchmarks import machine_facts, require_writable, write_result
from lightning_gpt.checkpoint.gpt2 import gpt2_config, is_transposed
from lightning_gpt.config import UserError
from lightning_gpt.generation import GenerationSettings
from lightning_gpt.implementations import GPT2Traits, Implementation, get_implementation
from lightning_gpt.models import GPTModule

CACHED, RECOMPUTE, TRANSFORMERS = "cached", "recompute", "transformers"
READ_BYTES = 2**29  # more than the caches of a processor hold


@dataclass(frozen=True)
class Shape:
    """A model and a task for it.

    Attributes:
        sizes: The fields of the model's config.
        prompt: Tokens that are there.
        new: Tokens that are to come.
    """

    sizes: dict[str, int]
    prompt: int
    new: int


SHAPES = {
    "small": Shape({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}, 1, 200),
    "124m": Shape({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}, 512, 64),
}


@dataclass(frozen=True)
class Case:
    """One shape and batch size.

    Attributes:
        shape: A key of SHAPES.
        batch_size: Texts written together.
        seconds: Of each way the rounds' times for all new tokens, prompt included.
        step_seconds: Of each round the mean time of a cached step after the first, which reads the prompt.
        gigabytes_per_second: What the machine's memory gave in each round.
        floor_seconds: The least time of a step: weights and cache read once, at the most that memory gave.
        same_tokens: Whether Hugging Face took the same tokens; None without it.
    """

    shape: str
    batch_size: int
    seconds: dict[str, list[float]]
    step_seconds: list[float]
    gigabytes_per_second: list[float]
    floor_seconds: float
    same_tokens: bool | None

    @property
    def floor_fraction(self) -> float:
        """The floor over the median step: 1 is the machine's limit."""
        return self.floor_seconds / statistics.median(self.step_seconds)

    def speeds(self, way: str) -> list[float]:
        """New tokens per second over all texts, round by round."""
        return [self.batch_size * SHAPES[self.shape].new / seconds for seconds in self.seconds[way]]

    def gain(self, way: str) -> float:
        """How many times faster the cache is than another way: the median of the rounds' ratios."""
        pairs = zip(self.seconds[way], self.seconds[CACHED], strict=True)
        return statistics.median(other / cached for other, cached in pairs)


@dataclass(frozen=True)
class Speeds:
    """All that was measured.

    Attributes:
        implementation: The model.
        rounds: How often each way was measured.
        recompute_steps: Timed steps of the plain loop; 0 for all.
        cases: The shapes and batch sizes.
        machine: Hardware and versions.
    """

    implementation: str
    rounds: int
    recompute_steps: int
    cases: list[Case]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        cases = [
            asdict(case)
            | {"floor_fraction": case.floor_fraction}
            | {"gain": {way: case.gain(way) for way in case.seconds if way != CACHED}}
            for case in self.cases
        ]
        return {"benchmark": "generate"} | asdict(self) | {"cases": cases}

    def table(self) -> str:
        """The same for people."""
        rows = [f"{'shape':7}{'batch':>6}  {'way':14}{'new tokens/s':>13}{'min':>9}{'max':>9}{'cached is':>12}"]
        for case in self.cases:
            for way in case.seconds:
                speeds = case.speeds(way)
                gain = f"{case.gain(way):.2f} times" if way != CACHED else ""
                spread = f"{statistics.median(speeds):13.1f}{min(speeds):9.1f}{max(speeds):9.1f}"
                rows.append(f"{case.shape:7}{case.batch_size:6}  {way:14}{spread}{gain:>12}")
        for case in self.cases:
            step = statistics.median(case.step_seconds)
            rows.append(
                f"{case.shape}, batch {case.batch_size}: a cached step takes {step * 1e3:.2f} ms, weights and cache"
                f" read once at {max(case.gigabytes_per_second):.1f} GB/s {case.floor_seconds * 1e3:.2f} ms:"
                f" {case.floor_fraction:.0%} of the floor's speed"
                + ("" if case.same_tokens is not False else "; transformers took OTHER tokens")
            )
        m = self.machine
        timed = (
            f"{self.recompute_steps} steps, spread over the lengths, stand for all" if self.recompute_steps else "all"
        )
        rows.append(
            f"{self.implementation}, greedy, float32; {self.rounds} rounds in turns; recompute: {timed}\n"
            f"{m['hardware']}, {m['cores']} cores, {m['threads']} threads; torch {m['torch']}, python {m['python']},"
            f" transformers {m['transformers']}"
        )
        return "\n".join(rows)


def measure_generation(
    *,
    shapes: str = "small,124m",
    batch_sizes: str = "1,8",
    implementation: str = "nanogpt",
    rounds: int = 5,
    recompute_steps: int = 8,
    threads: int | None = None,
    json: str | None = None,
) -> Speeds:
    """Times greedy generation with the cache, by the originals' loop, and by Hugging Face where it is installed.

    All have the same random weights and prompts, and take turns; the ratios are taken round by round. The originals'
    loop is a full forward of the last ``block_size`` tokens for each new one.

    Args:
        shapes: Keys of SHAPES, separated by commas.
        batch_sizes: Numbers, separated by commas.
        implementation: A model with GPT-2's layout.
        rounds: How often each way is measured.
        recompute_steps: Timed steps of the originals' loop, whose mean stands for all steps; 0 for all of them.
        threads: Threads that torch computes with; None for torch's own choice.
        json: Where the result is written as JSON as well.

    Raises:
        UserError: A setting makes no sense, or the file cannot be written.
    """
    for name in shapes.split(","):
        if name not in SHAPES:
            raise UserError(f"--shapes {name} is unknown; choose of {', '.join(SHAPES)}")
    if not all(size.isdecimal() and int(size) for size in batch_sizes.split(",")):
        raise UserError(f"--batch_sizes {batch_sizes} is not a list of numbers above 0, separated by commas")
    for name, value, least in (("rounds", rounds, 1), ("threads", threads, 1), ("recompute_steps", recompute_steps, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} makes no sense; give {least} or more")
    require_writable(json)
    row = get_implementation(implementation)
    if not row.builtin:
        raise UserError(f"--implementation {row.name} may not have the sizes of the shapes; choose a built-in one")
    before = torch.get_num_threads()
    cases = []
    try:
        torch.set_num_threads(threads or before)
        for name in shapes.split(","):
            for size in batch_sizes.split(","):
                cases.append(_measure(row, name, int(size), rounds=rounds, recompute_steps=recompute_steps))
    finally:
        torch.set_num_threads(before)
    machine = machine_facts(torch.device("cpu"), threads or before) | {"transformers": _transformers_version()}
    speeds = Speeds(row.name, rounds, recompute_steps, cases, machine)
    write_result(json, speeds.to_dict())
    return speeds


def _measure(row: Implementation, name: str, batch_size: int, *, rounds: int, recompute_steps: int) -> Case:
    shape = SHAPES[name]
    torch.manual_seed(0)
    fields = shape.sizes | (row.gpt2.fields(GPT2Traits()) if row.gpt2 else {})
    module = GPTModule(row.name, model_config=fields).eval()
    idx = torch.randint(shape.sizes["vocab_size"], (batch_size, shape.prompt))
    steps: list[float] = []
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, Tensor] = {}

    def cached() -> float:
        tokens[CACHED], first, total = _cached(module, idx, shape.new)
        steps.append((total - first) / (shape.new - 1))
        return total

    ways: dict[str, Callable[[], float]] = {
        CACHED: cached,
        RECOMPUTE: lambda: _recompute(module.model, idx, shape, recompute_steps or shape.new),
    }
    if _transformers_version():
        other = _transformers_model(row, module)

        def transformers() -> float:
            begun = time.perf_counter()
            ones = torch.ones_like(idx)
            tokens[TRANSFORMERS] = other.generate(
                idx, attention_mask=ones, max_new_tokens=shape.new, do_sample=False, pad_token_id=0, eos_token_id=None
            )[:, shape.prompt :]
            return time.perf_counter() - begun

        ways[TRANSFORMERS] = transformers
    rates = []
    with torch.no_grad():
        _cached(module, idx[:, :1], 2)  # what is slow the first time only
        for number in range(rounds):
            rates.append(_memory_rate())
            for way in ways if number % 2 == 0 else reversed(ways):
                seconds.setdefault(way, []).append(ways[way]())
    return Case(
        shape=name,
        batch_size=batch_size,
        seconds={way: seconds[way] for way in ways},
        step_seconds=steps,
        gigabytes_per_second=rates,
        floor_seconds=_bytes_per_step(module.model, shape, batch_size) / max(rates) / 1e9,
        same_tokens=torch.equal(tokens[CACHED], tokens[TRANSFORMERS]) if TRANSFORMERS in tokens else None,
    )


def _cached(module: GPTModule, idx: Tensor, new: int) -> tuple[Tensor, float, float]:
    """New tokens (B, new), seconds until the first of them, and until the last."""
    begun, first, taken = time.perf_counter(), 0.0, []
    for step in module.stream_tokens(idx.tolist(), GenerationSettings(max_new_tokens=new, greedy=True)):
        first = first or time.perf_counter() - begun
        taken.append([token for _, token in step])
    return torch.tensor(taken).T, first, time.perf_counter() - begun


def _recompute(model: nn.Module, idx: Tensor, shape: Shape, timed: int) -> float:
    """Seconds of the originals' loop; where not every step is timed, those in the middle of equal stretches of it."""
    block_size, timed = shape.sizes["block_size"], min(timed, shape.new)
    text = torch.cat((idx, torch.zeros(len(idx), shape.new, dtype=idx.dtype)), dim=1)
    begun = time.perf_counter()
    for number in range(timed):
        length = shape.prompt + (2 * number + 1) * shape.new // (2 * timed)
        logits, _ = model(text[:, max(0, length - block_size) : length])
        text[:, length] = logits[:, -1].argmax(-1)
    return (time.perf_counter() - begun) * shape.new / timed


def _memory_rate() -> float:
    """GB/s at which a matrix is read that is multiplied with a vector; the best of three."""
    matrix, vector = torch.ones(READ_BYTES // 4 // 1024, 1024), torch.ones(1024)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - begun)
    return READ_BYTES / best / 1e9


def _bytes_per_step(model: nn.Module, shape: Shape, batch_size: int) -> int:
    """What a step has to read: all weights but the rows of embeddings that it looks up, and keys and values so far."""
    read = {p for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    mean_length = shape.prompt + (shape.new + 1) / 2
    per_position = 2 * shape.sizes["n_layer"] * shape.sizes["n_embd"]
    return 4 * (sum(p.numel() for p in read) + int(batch_size * mean_length * per_position))


def _transformers_version() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    from importlib.metadata import version

    return version("transformers")


def _transformers_model(row: Implementation, module: GPTModule) -> Any:
    """Hugging Face's model of the same architecture, with the module's weights."""
    import transformers

    with contextlib.suppress(AttributeError):
        transformers.logging.set_verbosity_error()
    weights = module.model.state_dict()
    if row.hugging_face is None:
        config = gpt2_config(row, module.model_config)
        weights = {k: v.t() if is_transposed(k) else v for k, v in weights.items()}
    else:
        form = row.hugging_face(row.complete(module.model_config))
        config, weights = form.config, {form.rename(k): v for k, v in weights.items()}
    config.pop("architectures")
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    other.load_state_dict(weights)
    return other
