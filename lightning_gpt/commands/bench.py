"""Run a benchmark: ``python bench.py --help`` lists them."""

import sys
from collections.abc import Sequence

from lightning_gpt.bench.registry import BENCHMARKS
from lightning_gpt.cli import parse_options, reporting_errors
from lightning_gpt.config import UserError
from lightning_gpt.invocation import usage


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run one benchmark, and print its table.

    Args:
        argv: The benchmark's name and its flags (default: this process's arguments).
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(f"usage: {usage('bench')} NAME [--help]\n")
        print("\n".join(f"{name:14}{row.description}" for name, row in BENCHMARKS.items()))
        return
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    row = BENCHMARKS[name]
    print(row.run(parse_options(row.options, flags, description=f"{row.description[0].upper()}{row.description[1:]}.")))
