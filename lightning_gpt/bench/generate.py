"""``bench.py generate``: generation on a CPU against the original loop, Hugging Face and the memory bandwidth."""

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

from lightning_gpt.atomic import require_writable
from lightning_gpt.bench.report import machine_facts, write_result
from lightning_gpt.checkpoint.architectures import architecture_of, to_hugging_face
from lightning_gpt.config import UserError
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.implementations.registry import Implementation, get_implementation
from lightning_gpt.models import GPTModule

CACHED, COMPILED, RECOMPUTE, TRANSFORMERS = "cached", "compiled", "recompute", "transformers"
READ_BYTES = 2**29  # more than the processor's caches hold


@dataclass(frozen=True)
class Shape:
    """A model size and a number of tokens.

    Attributes:
        sizes: The fields of the model's config.
        prompt: Tokens per prompt.
        new: New tokens per text.
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
    """Results for one shape and batch size.

    Attributes:
        shape: A key of SHAPES.
        batch_size: Texts generated together.
        seconds: Time for all new tokens including the prompt, by method and round.
        step_seconds: Mean time of a step, without the prompt's, by method and round; only our methods.
        compile_seconds: Compilation time; None without compilation.
        gigabytes_per_second: Memory bandwidth measured in each round.
        floor_seconds: Lower bound of a step: the time to read weights and cache once, at the highest bandwidth.
        same_tokens: Whether all methods with a cache generated the same tokens; None for a single method.
    """

    shape: str
    batch_size: int
    seconds: dict[str, list[float]]
    step_seconds: dict[str, list[float]]
    compile_seconds: float | None
    gigabytes_per_second: list[float]
    floor_seconds: float
    same_tokens: bool | None

    def bandwidth_fraction(self, method: str) -> float:
        """Return the fraction of the memory bandwidth that the median step reaches."""
        return self.floor_seconds / statistics.median(self.step_seconds[method])

    def speeds(self, method: str) -> list[float]:
        """Return the new tokens per second over all texts, for each round."""
        return [self.batch_size * SHAPES[self.shape].new / seconds for seconds in self.seconds[method]]

    def gain(self, method: str, *, ours: str) -> float:
        """Return the speedup of our method over another: the median of the ratios of all rounds."""
        pairs = zip(self.seconds[method], self.seconds[ours], strict=True)
        return statistics.median(other / own for other, own in pairs)


@dataclass(frozen=True)
class Speeds:
    """Results of all cases.

    Attributes:
        implementation: Name of the model.
        rounds: Number of measurements of each method.
        recompute_steps: Number of timed steps of the original loop; 0 means all.
        cases: One per shape and batch size.
        machine: Hardware and versions.
    """

    implementation: str
    rounds: int
    recompute_steps: int
    cases: list[Case]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the results in plain types, for JSON."""
        cases = [
            asdict(case)
            | {"floor_fraction": {method: case.bandwidth_fraction(method) for method in case.step_seconds}}
            | {"gain": {o: {method: case.gain(method, ours=o) for method in case.seconds} for o in case.step_seconds}}
            for case in self.cases
        ]
        return {"benchmark": "generate"} | asdict(self) | {"cases": cases}

    def table(self) -> str:
        """Return the results as a table."""
        ours = list(self.cases[0].step_seconds)
        heads = "".join(f"{method + ' is':>14}" for method in ours)
        rows = [f"{'shape':7}{'batch':>6}  {'way':14}{'new tokens/s':>13}{'min':>9}{'max':>9}{heads}"]
        for case in self.cases:
            for method in case.seconds:
                speeds = case.speeds(method)
                gains = [f"{case.gain(method, ours=o):.2f} times" if method != o else "" for o in ours]
                gain = "".join(f"{gain:>14}" for gain in gains)
                spread = f"{statistics.median(speeds):13.1f}{min(speeds):9.1f}{max(speeds):9.1f}"
                rows.append(f"{case.shape:7}{case.batch_size:6}  {method:14}{spread}{gain}".rstrip())
        for case in self.cases:
            rows.append(
                f"{case.shape}, batch {case.batch_size}: weights and cache read once at"
                f" {max(case.gigabytes_per_second):.1f} GB/s take {case.floor_seconds * 1e3:.2f} ms"
            )
            for method, seconds in case.step_seconds.items():
                step = f"; a {method} step {statistics.median(seconds) * 1e3:.2f} ms"
                rows[-1] += f"{step}: {case.bandwidth_fraction(method):.0%} of the bandwidth limit"
            if case.compile_seconds is not None:
                rows[-1] += f"; compiled in {case.compile_seconds:.0f} s"
            if case.same_tokens is False:
                rows[-1] += "; NOT the same tokens"
        m = self.machine
        timed = (
            f"extrapolated from {self.recompute_steps} steps, spread over the lengths"
            if self.recompute_steps
            else "all"
        )
        rows.append(
            f"{self.implementation}, greedy, float32; {self.rounds} alternating rounds; recompute: {timed}\n"
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
    """Time greedy generation with the cache, with the original loop, and with Hugging Face if installed.

    All methods use the same random weights and prompts and take turns; ratios are computed within a round. The
    original loop, minGPT's and nanoGPT's, reads the last ``block_size`` tokens in full for each new one.

    Args:
        shapes: Keys of SHAPES, separated by commas.
        batch_sizes: Numbers, separated by commas.
        implementation: Name of a built-in model.
        rounds: Number of measurements of each method.
        recompute_steps: Number of timed steps of the original loop, from which its time is extrapolated; 0: all.
        compile: Whether, or with which backend or mode, to measure the compiled step as well.
        threads: Number of torch's threads; None for torch's default.
        json: File for the results as JSON.

    Raises:
        UserError: An option is invalid, or the file cannot be written.
    """
    for name in shapes.split(","):
        if name not in SHAPES:
            raise UserError(f"--shapes {name} is unknown; choose from {', '.join(SHAPES)}")
    if not all(size.isdecimal() and int(size) for size in batch_sizes.split(",")):
        raise UserError(f"--batch_sizes {batch_sizes} is not a list of positive numbers; separate them by commas")
    for name, value, least in (("rounds", rounds, 1), ("threads", threads, 1), ("recompute_steps", recompute_steps, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small; give {least} or more")
    require_writable(json)
    row = get_implementation(implementation)
    if not row.builtin:
        raise UserError(f"--implementation {row.name} may lack the sizes that shapes set; choose a built-in one")
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

    def ours(method: str, writer: GPTModule) -> float:
        tokens[method], first, total = _cached(writer, idx, shape.new)
        steps.setdefault(method, []).append((total - first) / (shape.new - 1))
        return total

    methods: dict[str, Callable[[], float]] = {CACHED: partial(ours, CACHED, module)}
    twin = copy.copy(module)  # shares the weights
    if twin.compile_generation(compile):
        methods[COMPILED] = partial(ours, COMPILED, twin)
    methods[RECOMPUTE] = partial(_recompute, module.model, idx, shape, timed or shape.new)
    if _transformers_version():
        other = _transformers_model(row, module)

        def transformers() -> float:
            started = time.perf_counter()
            ones = torch.ones_like(idx)
            tokens[TRANSFORMERS] = other.generate(
                idx, attention_mask=ones, max_new_tokens=shape.new, do_sample=False, pad_token_id=0, eos_token_id=None
            )[:, shape.prompt :]
            return time.perf_counter() - started

        methods[TRANSFORMERS] = transformers
    rates = []
    with torch.no_grad():
        _cached(module, idx[:, :1], 2)  # warm up
        compile_seconds = None
        if COMPILED in methods:
            compile_seconds = methods[COMPILED]()
            steps.clear()
        for number in range(rounds):
            rates.append(_memory_rate())
            for method in methods if number % 2 == 0 else reversed(methods):
                seconds.setdefault(method, []).append(methods[method]())
    return Case(
        shape=name,
        batch_size=batch_size,
        seconds={method: seconds[method] for method in methods},
        step_seconds=steps,
        compile_seconds=compile_seconds,
        gigabytes_per_second=rates,
        floor_seconds=_bytes_per_step(module.model, shape, batch_size) / max(rates) / 1e9,
        same_tokens=all(torch.equal(tokens[CACHED], t) for t in tokens.values()) if len(tokens) > 1 else None,
    )


def _cached(module: GPTModule, idx: Tensor, new: int) -> tuple[Tensor, float, float]:
    """Return the new tokens (B, new), and the seconds until the first and the last of them."""
    started, first, taken = time.perf_counter(), 0.0, []
    for step in module.stream_tokens(idx.tolist(), GenerationSettings(max_new_tokens=new, greedy=True)):
        first = first or time.perf_counter() - started
        taken.append([token for _, token in step])
    return torch.tensor(taken).T, first, time.perf_counter() - started


def _recompute(model: nn.Module, idx: Tensor, shape: Shape, timed: int) -> float:
    """Return the seconds of the original loop, extrapolated from `timed` steps at evenly spaced lengths."""
    block_size, timed = shape.sizes["block_size"], min(timed, shape.new)
    text = torch.cat((idx, torch.zeros(len(idx), shape.new, dtype=idx.dtype)), dim=1)
    started = time.perf_counter()
    for number in range(timed):
        length = shape.prompt + (2 * number + 1) * shape.new // (2 * timed)
        logits, _ = model(text[:, max(0, length - block_size) : length])
        text[:, length] = logits[:, -1].argmax(-1)
    return (time.perf_counter() - started) * shape.new / timed


def _memory_rate() -> float:
    """Return the memory bandwidth in GB/s: the best of three matrix-vector products."""
    matrix, vector = torch.ones(READ_BYTES // 4 // 1024, 1024), torch.ones(1024)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best / 1e9


def _bytes_per_step(model: nn.Module, shape: Shape, batch_size: int) -> int:
    """Return the bytes that a step must read: the weights without embeddings, and all keys and values so far."""
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
    """Return Hugging Face's model of the same architecture, with the module's weights."""
    import transformers

    with contextlib.suppress(AttributeError):
        transformers.logging.set_verbosity_error()
    config, weights = to_hugging_face(row, fields=module.model_config, state_dict=module.model.state_dict())
    config.pop("architectures")
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    other.load_state_dict(weights)
    return other
