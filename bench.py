"""Measures: ``python bench.py --help``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module

from lightning_gpt.cli import parse_options, reporting_errors
from lightning_gpt.config import (
    GenerateOptions,
    ParityOptions,
    PrepareSpeedOptions,
    TaxOptions,
    TimeToLossOptions,
    UserError,
)

# Options, what measures, and what is measured.
BENCHMARKS = {
    "tax": (TaxOptions, "tax:measure_tax", "time per step of train.py over that of a hand-written loop"),
    "parity": (ParityOptions, "parity:measure_parity", "losses and weights under every strategy, to a single process"),
    "prepare": (PrepareSpeedOptions, "prepare:measure_prepare", "speed of prepare.py, to tiktoken's batch encoder"),
    "generate": (GenerateOptions, "generate:measure_generation", "new tokens per second, and the floor of it"),
    "time_to_loss": (TimeToLossOptions, "time_to_loss:measure_time_to_loss", "steps and seconds to nanoGPT's loss"),
}


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints a table."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print("usage: bench.py NAME [--help]\n")
        print("\n".join(f"{name:14}{what}" for name, (*_, what) in BENCHMARKS.items()))
        return
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    cls, measure, what = BENCHMARKS[name]
    options = parse_options(cls, rest, description=f"Measure: {what}.")
    module, function = measure.split(":")  # imported after parsing, so that --help need not wait for torch
    print(getattr(import_module(f"lightning_gpt.bench.{module}"), function)(**asdict(options)).table())


if __name__ == "__main__":
    main()
