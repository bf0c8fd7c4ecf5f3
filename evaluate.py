"""Score checkpoints: ``python evaluate.py --help``."""

from lightning_gpt.commands.evaluate import main

if __name__ == "__main__":
    main()
