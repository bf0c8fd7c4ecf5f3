"""Run a benchmark: ``python bench.py --help`` lists them."""

from lightning_gpt.commands.bench import main

if __name__ == "__main__":
    main()
