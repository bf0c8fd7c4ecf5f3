"""A training run: its parts, callbacks and header."""
