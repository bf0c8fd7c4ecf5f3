"""Training data: text/ finds text, tokens/ turns it into token files, streams.py orders samples, loading.py feeds them.

tasks/ generates samples in place of text, and characters.py is a data set for scripts. Imports run from loading.py to
tasks/, streams.py, tokens/ and text/.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import CharDataset on first use, so that importing the package does not import torch."""
    if name != "CharDataset":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from lightning_gpt.data.characters import CharDataset

    return CharDataset
