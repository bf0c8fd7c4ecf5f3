"""The LightningModules by name, and their forms for strategies that shard."""

from lightning_gpt.models.module import GPTModule
from lightning_gpt.models.named import (
    FORMS,
    DeepSpeedGPTModule,
    DeepSpeedMinGPT,
    DeepSpeedNanoGPT,
    FSDPGPTModule,
    FSDPMinGPT,
    FSDPNanoGPT,
    MinGPT,
    NanoGPT,
)

__all__ = [
    "FORMS",
    "DeepSpeedGPTModule",
    "DeepSpeedMinGPT",
    "DeepSpeedNanoGPT",
    "FSDPGPTModule",
    "FSDPMinGPT",
    "FSDPNanoGPT",
    "GPTModule",
    "MinGPT",
    "NanoGPT",
]
