"""Text to token files.

preparation.py serves `--data` and prepare.py, token_files.py is the format on disk. A corpus passes through
tokenizing.py: splitting.py (train or val), encoding.py (pieces, threads), writing.py (files that survive a kill).
"""
