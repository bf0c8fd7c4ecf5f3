"""Time training runs."""

import contextlib
import os
import time

import torch
from lightning import Callback

from lightning_gpt.config import TrainConfig
from lightning_gpt.training.run import train


def device_time(device: torch.device) -> float:
    """Wait until the device is idle, and return the time of a monotonic clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_silently(config: TrainConfig, callback: Callback) -> None:
    """Train with one more callback, and discard the terminal output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        train(config, callbacks=[callback])
