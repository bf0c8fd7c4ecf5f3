"""Write text with a trained model: ``python sample.py --help``."""

import contextlib
import sys
from collections.abc import Sequence

from lightning_gpt.cli import parse_sample, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the samples to stdout."""
    options = parse_sample(argv)
    from lightning_gpt.sampling import write_samples  # imports torch, which --help must not

    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the text; libraries print too
        write_samples(options, out=out)
