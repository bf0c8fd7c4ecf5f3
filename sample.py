"""Writes text with a trained model: ``python sample.py --help``."""

from collections.abc import Sequence

from lightning_gpt.cli import parse_sample, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the samples to stdout."""
    options = parse_sample(argv)
    from lightning_gpt.generation import samples  # after parsing, so that --help need not wait for torch

    for text in samples(options):
        print(text)


if __name__ == "__main__":
    main()
