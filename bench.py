"""Measures: ``python bench.py tax --help``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning_gpt.cli import parse_options, reporting_errors
from lightning_gpt.config import UserError


@dataclass(frozen=True)
class TaxOptions:
    """How long the comparison with a hand-written loop takes, and where its numbers go."""

    rounds: int = 7
    """how often each path is measured, in turns"""
    steps: int = 100
    """optimizer steps that are timed in each round, after 10 of warm-up"""
    threads: int | None = None
    """threads that torch computes with (default: torch's own choice); 1 where other programs are busy"""
    json: str | None = None
    """also write the result to this file"""


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints a table."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print("usage: bench.py tax [--help]\n\ntax  time per step of train.py over that of a hand-written loop")
        return
    if name != "tax":
        raise UserError(f"there is no benchmark {name!r}; choose one of tax")
    options = parse_options(TaxOptions, rest, description="Time a step of train.py beside a hand-written loop's.")
    from lightning_gpt.benchmarks import measure_tax  # after parsing, so that --help need not wait for torch

    print(measure_tax(**asdict(options)).table())


if __name__ == "__main__":
    main()
