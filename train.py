"""Trains a GPT: ``python train.py --help``."""

from collections.abc import Sequence

from lightning_gpt.cli import parse_train, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    config = parse_train(argv)
    from lightning_gpt.training.run import train  # after parsing, so that --help need not wait for torch

    train(config)


if __name__ == "__main__":
    main()
