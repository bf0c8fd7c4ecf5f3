"""Train a GPT: ``python train.py --help``."""

from lightning_gpt.commands.train import main

if __name__ == "__main__":
    main()
