"""The LightningModules, one for each built-in model, and their forms for FSDP and DeepSpeed."""

from lightning_gpt.models.forms import FORMS, DeepSpeedGPTModule, FSDPGPTModule
from lightning_gpt.models.module import GPTModule
from lightning_gpt.models.named import (
    MINGPT_PRESETS,
    DeepSpeedMinGPT,
    DeepSpeedModernGPT,
    DeepSpeedNanoGPT,
    FSDPMinGPT,
    FSDPModernGPT,
    FSDPNanoGPT,
    MinGPT,
    ModernGPT,
    NanoGPT,
)

__all__ = [
    "FORMS",
    "MINGPT_PRESETS",
    "DeepSpeedGPTModule",
    "DeepSpeedMinGPT",
    "DeepSpeedModernGPT",
    "DeepSpeedNanoGPT",
    "FSDPGPTModule",
    "FSDPMinGPT",
    "FSDPModernGPT",
    "FSDPNanoGPT",
    "GPTModule",
    "MinGPT",
    "ModernGPT",
    "NanoGPT",
]
