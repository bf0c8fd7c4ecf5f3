"""How fast text is written on a CPU: beside the originals' loop, beside Hugging Face, and beside what memory allows."""

import contextlib
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gpt.bench.report import machine_facts, require_writable, write_result
from lightning_gpt.checkpoint.architectures import architecture_of, to_hugging_face
from lightning_gpt.config import UserError
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.implementations.registry import Implementation, get_implementation
from lightning_gpt.models import GPTModule

CACHED, COMPILED, RECOMPUTE, TRANSFORMERS = "cached", "compiled", "recompute", "transformers"
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
        step_seconds: Of our ways the rounds' mean times of a step after the first, which reads the prompt.
        compile_seconds: What compiling took; None where it was not asked for.
        gigabytes_per_second: What the machine's memory gave in each round.
        floor_seconds: The least time of a step: weights and cache read once, at the most that memory gave.
        same_tokens: Whether all with a cache took the same tokens; None where there is but one.
    """

    shape: str
    batch_size: int
    seconds: dict[str, list[float]]
    step_seconds: dict[str, list[float]]
    compile_seconds: float | None
    gigabytes_per_second: list[float]
    floor_seconds: float
    same_tokens: bool | None

    def floor_fraction(self, way: str) -> float:
        """The floor over the median step: 1 is the machine's limit."""
        return self.floor_seconds / statistics.median(self.step_seconds[way])

    def speeds(self, way: str) -> list[float]:
        """New tokens per second over all texts, round by round."""
        return [self.batch_size * SHAPES[self.shape].new / seconds for seconds in self.seconds[way]]

    def gain(self, way: str, *, ours: str) -> float:
        """How many times faster one of our ways is than another: the median of the rounds' ratios."""
        pairs = zip(self.seconds[way], self.seconds[ours], strict=True)
        return statistics.median(other / own for other, own in pairs)


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
            | {"floor_fraction": {way: case.floor_fraction(way) for way in case.step_seconds}}
            | {"gain": {o: {way: case.gain(way, ours=o) for way in case.seconds} for o in case.step_seconds}}
            for case in self.cases
        ]
        return {"benchmark": "generate"} | asdict(self) | {"cases": cases}

    def table(self) -> str:
        """The same for people."""
        ours = list(self.cases[0].step_seconds)
        heads = "".join(f"{way + ' is':>14}" for way in ours)
        rows = [f"{'shape':7}{'batch':>6}  {'way':14}{'new tokens/s':>13}{'min':>9}{'max':>9}{heads}"]
        for case in self.cases:
            for way in case.seconds:
                speeds = case.speeds(way)
                gains = [f"{case.gain(way, ours=o):.2f} times" if way != o else "" for o in ours]
                gain = "".join(f"{gain:>14}" for gain in gains)
                spread = f"{statistics.median(speeds):13.1f}{min(speeds):9.1f}{max(speeds):9.1f}"
                rows.append(f"{case.shape:7}{case.batch_size:6}  {way:14}{spread}{gain}".rstrip())
        for case in self.cases:
            rows.append(
                f"{case.shape}, batch {case.batch_size}: weights and cache read once at"
                f" {max(case.gigabytes_per_second):.1f} GB/s take {case.floor_seconds * 1e3:.2f} ms"
            )
            for way, seconds in case.step_seconds.items():
                step = f"; a {way} step {statistics.median(seconds) * 1e3:.2f} ms"
                rows[-1] += f"{step}: {case.floor_fraction(way):.0%} of that speed"
            if case.compile_seconds is not None:
                rows[-1] += f"; compiled in {case.compile_seconds:.0f} s"
            if case.same_tokens is False:
                rows[-1] += "; NOT the same tokens"
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
    compile: bool | str = False,
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
        compile: Whether, or with which backend or mode, it is measured compiled, too; compiling is timed apart.
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
                case = _measure(row, name, int(size), rounds=rounds, timed=recompute_steps, compile=compile)
                cases.append(case)
    finally:
        torch.set_num_threads(before)
    machine = machine_facts(torch.device("cpu"), threads or before) | {"transformers": _transformers_version()}
    speeds = Speeds(row.name, rounds, recompute_steps, cases, machine)
    write_result(json, speeds.to_dict())
    return speeds


def _measure(row: Implementation, name: str, batch_size: int, *, rounds: int, timed: int, compile: bool | str) -> Case:
    shape = SHAPES[name]
    torch.manual_seed(0)
    fields = shape.sizes | architecture_of(row).choices(row)
    module = GPTModule(row.name, model_config=fields).eval()
    idx = torch.randint(shape.sizes["vocab_size"], (batch_size, shape.prompt))
    steps: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, Tensor] = {}

    def ours(way: str, writer: GPTModule) -> float:
        tokens[way], first, total = _cached(writer, idx, shape.new)
        steps.setdefault(way, []).append((total - first) / (shape.new - 1))
        return total

    ways: dict[str, Callable[[], float]] = {CACHED: partial(ours, CACHED, module)}
    twin = copy.copy(module)  # the same weights
    if twin.compile_generation(compile):
        ways[COMPILED] = partial(ours, COMPILED, twin)
    ways[RECOMPUTE] = partial(_recompute, module.model, idx, shape, timed or shape.new)
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
        compile_seconds = None
        if COMPILED in ways:
            compile_seconds = ways[COMPILED]()
            steps.clear()
        for number in range(rounds):
            rates.append(_memory_rate())
            for way in ways if number % 2 == 0 else reversed(ways):
                seconds.setdefault(way, []).append(ways[way]())
    return Case(
        shape=name,
        batch_size=batch_size,
        seconds={way: seconds[way] for way in ways},
        step_seconds=steps,
        compile_seconds=compile_seconds,
        gigabytes_per_second=rates,
        floor_seconds=_bytes_per_step(module.model, shape, batch_size) / max(rates) / 1e9,
        same_tokens=all(torch.equal(tokens[CACHED], t) for t in tokens.values()) if len(tokens) > 1 else None,
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
    config, weights = to_hugging_face(row, fields=module.model_config, state_dict=module.model.state_dict())
    config.pop("architectures")
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    other.load_state_dict(weights)
    return other
