"""Turn text into token files, or extract a model's token embeddings: ``python prepare.py --help``."""

from lightning_gpt.commands.prepare import main

if __name__ == "__main__":
    main()
