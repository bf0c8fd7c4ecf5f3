"""Compare strategies, plan and watch runs, and write text, in a browser: ``python app.py --help``."""

from lightning_gpt.commands.app import main

if __name__ == "__main__":
    main()
