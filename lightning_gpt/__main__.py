"""One program for all commands: ``lightning-gpt train``, or ``python -m lightning_gpt train``."""

import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_gpt import __version__
from lightning_gpt.cli import reporting_errors
from lightning_gpt.config import UserError

COMMANDS = {
    "train": "train a GPT",
    "evaluate": "score, convert and export checkpoints",
    "sample": "write text with a trained model",
    "prepare": "turn text into token files",
    "bench": "run a benchmark",
    "app": "compare strategies, plan and watch runs, and write text, in a browser",
}


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: The command's name and its flags (default: this process's arguments).
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lightning-gpt COMMAND [--help]\n")
        print("\n".join(f"{name:14}{description}" for name, description in COMMANDS.items()))
        return
    if name == "--version":
        print(__version__)
        return
    name = name.removesuffix(".py")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    import_module(f"lightning_gpt.commands.{name}").main(flags)


if __name__ == "__main__":
    main()
