"""Turns text into token files: ``python prepare.py --help``."""

from collections.abc import Sequence

from lightning_gpt.cli import parse_prepare, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, writes the token files, and prints what they hold."""
    options = parse_prepare(argv)
    from lightning_gpt.data.preparation import prepare_folder  # after parsing, so that --help need not wait for torch

    print(prepare_folder(options))


if __name__ == "__main__":
    main()
