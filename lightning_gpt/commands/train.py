"""Train a GPT: ``python train.py --help``."""

from collections.abc import Sequence

from lightning_gpt.cli import parse_train, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    config = parse_train(argv)
    from lightning_gpt.training.run import train  # imports torch, which --help must not

    train(config)
