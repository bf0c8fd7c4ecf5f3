"""Train GPTs written as plain PyTorch under any Lightning strategy, from one command line."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DeepSpeedMinGPT": "lightning_gpt.models",
    "DeepSpeedModernGPT": "lightning_gpt.models",
    "DeepSpeedNanoGPT": "lightning_gpt.models",
    "FSDPMinGPT": "lightning_gpt.models",
    "FSDPModernGPT": "lightning_gpt.models",
    "FSDPNanoGPT": "lightning_gpt.models",
    "GPTModule": "lightning_gpt.models",
    "MinGPT": "lightning_gpt.models",
    "ModernGPT": "lightning_gpt.models",
    "NanoGPT": "lightning_gpt.models",
    "Task": "lightning_gpt.data.tasks.base",
    "TokenData": "lightning_gpt.data.loading",
    "UserError": "lightning_gpt.config",
    "load": "lightning_gpt.checkpoint",
    "parse_train": "lightning_gpt.cli",
    "prepare": "lightning_gpt.data.tokens.preparation",
    "train": "lightning_gpt.training.run",
}
_ROOMS = ("bench", "callbacks", "data", "models")
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name or room on first use, so that importing the package does not import torch."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)
