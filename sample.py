"""Write text with a trained model: ``python sample.py --help``."""

from lightning_gpt.commands.sample import main

if __name__ == "__main__":
    main()
