"""minGPT: a small, readable GPT for a single device, and minGPT's modules for scripts."""

from importlib import import_module
from typing import Any

_MODULES = ("bpe", "model", "trainer", "utils")


def __getattr__(name: str) -> Any:
    """Import a module of the package on first use, so that importing the package does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return import_module(f"{__name__}.{name}")
