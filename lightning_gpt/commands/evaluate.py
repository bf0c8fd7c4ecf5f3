"""Score checkpoints: ``python evaluate.py --help``."""

import contextlib
import sys
from collections.abc import Sequence

from lightning_gpt.cli import parse_evaluate, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, score, and print the scores."""
    options = parse_evaluate(argv)
    from lightning_gpt.evaluation.evaluate import evaluate, rewrite  # imports torch, which --help must not

    rewrites = options.convert_only or options.export is not None or options.out is not None
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the scores; libraries print too
        folder = rewrite(options) if rewrites else None
        report = None if rewrites else evaluate(options)
    if folder:
        print(f"{'exported' if options.export else 'converted':14}{folder}")
    if report:
        print(report.text())
