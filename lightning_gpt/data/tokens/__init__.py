"""Text to token files: encode, split, write, and open what `--data` names."""
