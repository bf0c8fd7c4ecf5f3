"""The benchmarks of bench.py: one row each, and their options.

To add one, write its file in this folder, declare its options here, and add a row to ``BENCHMARKS``. Nothing here
imports torch, so that ``--help`` is fast.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class TaxOptions:
    """Length of the measurement, and its output file."""

    rounds: int = 7
    """number of measurements of each path; the paths take turns"""
    steps: int = 100
    """timed optimizer steps per round, after 10 warm-up steps"""
    threads: int | None = None
    """number of torch threads (default: torch's own choice); use 1 on a busy machine"""
    compile: bool = False
    """compile the model of both paths"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class ParityOptions:
    """Runs to compare, and the output file."""

    steps: int = 10
    """optimizer steps of each run"""
    devices: int | None = None
    """number of ranks (default: all GPUs, or 2 on a CPU)"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    strategies: str | None = None
    """strategy names, separated by commas (default: all)"""
    data: str = "stdlib"
    """text or token files, as for train.py"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class PrepareSpeedOptions:
    """Text to tokenize, length of the measurement, and its output file."""

    rounds: int = 5
    """number of measurements of each path; the paths take turns"""
    megabytes: int = 32
    """length of the text, in millions of bytes"""
    workers: int | None = None
    """number of tokenizing threads (default: one per processor core)"""
    data: str | None = None
    """a text file, repeated up to --megabytes (default: random words)"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class GenerateOptions:
    """Models and batch sizes to generate with, length of the measurement, and its output file."""

    shapes: str = "small,124m"
    """model sizes, separated by commas: small (6/6/384, block 256: 200 new tokens after 1) or 124m (12/12/768, block
    1024: 64 new tokens after 512)"""
    batch_sizes: str = "1,8"
    """numbers of texts generated together, separated by commas"""
    implementation: str = "nanogpt"
    """mingpt, nanogpt or moderngpt"""
    rounds: int = 5
    """number of measurements of each method; the methods take turns"""
    recompute_steps: int = 8
    """timed steps of the loop without a cache, spread over the text lengths; 0 times every step"""
    compile: bool | str = False
    """also measure sample.py --compile; alone, or with a backend or mode as there"""
    threads: int | None = None
    """number of torch threads (default: torch's own choice)"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class TimeToLossOptions:
    """Runs to compare, and the output files."""

    data: str = "data/shakespeare_char"
    """tiny Shakespeare as a text file or token files (default: the folder that `prepare.py shakespeare_char --out
    data/shakespeare_char` writes)"""
    recipe: str = "cpu"
    """nanoGPT's settings, shared by all rows: cpu (4/4/128, block 64, batch 12, 2000 steps) or gpu (6/6/384, block 256,
    batch 64, 5000 steps)"""
    rows: str | None = None
    """row names, separated by commas; the first is the baseline (default: all)"""
    seeds: int = 3
    """number of runs of each row"""
    steps: int | None = None
    """optimizer steps of the longest row, for a short trial; other rows shrink in proportion (default: the recipe's)"""
    threads: int | None = None
    """number of torch threads (default: torch's own choice)"""
    json: str | None = None
    """also write the result, with its curves, to this file"""
    plot: str | None = None
    """also draw the curves into this file, .png or .svg"""
    from_file: str | None = None
    """show an earlier result, written by --json, instead of training (also --from)"""


@dataclass(frozen=True)
class ReliabilityOptions:
    """What to break, how often, and the output file."""

    parts: str = "kills,files,signals,disk,endurance"
    """parts to measure, separated by commas"""
    kills: int = 100
    """number of kills of a single process"""
    rank_kills: int = 20
    """number of kills of two ranks, for each strategy"""
    strategies: str = "single,ddp,fsdp,deepspeed_stage_2,deepspeed_stage_3"
    """strategies of the kills and signals, separated by commas; single is one process"""
    files: int = 10000
    """number of mutated files, over all formats"""
    steps: int = 20000
    """optimizer steps of the long run"""
    corpus_gb: float = 4.0
    """size of its memory-mapped corpus, in 10^9 bytes"""
    seed: int = 0
    """seed of the random moments and mutations"""
    json: str | None = None
    """also write the result to this file, after each part"""


@dataclass(frozen=True)
class GpuOptions:
    """Steps to run, the time that they may take, and the output file."""

    steps: str | None = None
    """names of steps, separated by commas (default: all)"""
    minutes: int = 8
    """time limit of all steps together"""
    accelerator: str = "gpu"
    """gpu, or cpu to try the steps with small models"""
    json: str | None = None
    """also write the result to this file, after each step"""


@dataclass(frozen=True)
class StrategiesOptions:
    """Combinations to train, and the output file."""

    sizes: str = "10m,50m,124m"
    """model sizes, separated by commas: 10m, 50m, 124m, 350m, 774m, 1558m, or LAYERS/HEADS/WIDTH"""
    strategies: str = "all"
    """strategy names, separated by commas"""
    recompute: str = "both"
    """off, on or both: without activation checkpointing, with it, or each in turn"""
    implementation: str = "nanogpt"
    """mingpt, nanogpt or moderngpt"""
    batch_size: int = 8
    """sequences per device whose steps are measured; the search for the largest batch starts there"""
    block_size: int = 128
    """tokens per sequence"""
    devices: int | None = None
    """number of ranks (default: all GPUs, or 2 on a CPU)"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    precision: str = "auto"
    """as for train.py"""
    steps: int = 5
    """timed optimizer steps of each combination, after 2 warm-up steps"""
    minutes: float = 5
    """time limit of each group of processes; one that takes longer is a row that says so"""
    memory_gib: float | None = None
    """memory that a device may use (default: all of a GPU); on a CPU, the largest batch is searched for only with
    this"""
    threads: int | None = None
    """number of torch threads of each rank (default: 1 on a CPU)"""
    csv: str | None = None
    """also write the rows to this file, after each one"""


@dataclass(frozen=True)
class ReportOptions:
    """Which results are shown, and the output file."""

    results: str = "results"
    """folder of results: .json and .csv files that the benchmarks write"""
    out: str = "report.html"
    """HTML file to write; it needs no other file and no network"""


@dataclass(frozen=True)
class PlanOptions:
    """The measurements, and how they were made."""

    against: str | None = None
    """CSV file with the columns of results/strategies_8xa100_2021.csv; also n_head, n_embd, vocab_size, block_size,
    batch_size, devices and precision where rows differ in them"""
    settings: str | None = None
    """YAML file that says how the runs were made (default: the one beside the CSV file, or else
    results/strategies_8xa100_2021.yaml)"""
    csv: str | None = None
    """also write the planned values to this file, with the columns of the measurements; app.py shows NAME_planned.csv
    beside NAME.csv"""


@dataclass(frozen=True)
class Benchmark:
    """A row of the registry.

    Attributes:
        options: Dataclass of the benchmark's flags.
        measure: ``module:function`` within this folder. The function takes the options as keyword arguments and returns
            an object whose ``table()`` is the text to print.
        description: What the benchmark measures, for ``--help``.
    """

    options: type
    measure: str
    description: str

    def run(self, options: Any) -> str:
        """Import the benchmark, run it, and return its table."""
        module, _, name = self.measure.partition(":")
        function: Callable[..., Any] = getattr(import_module(f"lightning_gpt.bench.{module}"), name)
        return function(**asdict(options)).table()


BENCHMARKS = {
    "tax": Benchmark(TaxOptions, "tax:measure_tax", "time per step of train.py, relative to a hand-written loop"),
    "parity": Benchmark(
        ParityOptions, "parity:measure_parity", "losses and weights of every strategy against a single process"
    ),
    "prepare": Benchmark(
        PrepareSpeedOptions, "prepare:measure_prepare", "speed of prepare.py, relative to tiktoken's batch encoder"
    ),
    "generate": Benchmark(
        GenerateOptions, "generate:measure_generation", "new tokens per second, and the limit that memory sets"
    ),
    "time_to_loss": Benchmark(
        TimeToLossOptions, "time_to_loss:measure_time_to_loss", "steps and seconds until nanoGPT's loss is reached"
    ),
    "strategies": Benchmark(
        StrategiesOptions, "strategies:measure_strategies", "memory, speed and largest batch of every strategy"
    ),
    "report": Benchmark(ReportOptions, "page:write_report", "one HTML page with all recorded results"),
    "plan": Benchmark(PlanOptions, "plan:compare_plans", "planned memory and largest batch, against measured ones"),
    "gpu": Benchmark(GpuOptions, "gpu:measure_gpu", "whether everything works on this GPU, and how fast"),
    "reliability": Benchmark(
        ReliabilityOptions, "reliability:measure_reliability", "outcome of kills, signals, full disks and damaged files"
    ),
}
