"""Time training runs."""

import contextlib
import os

from lightning import Callback

from lightning_gpt.config import TrainConfig
from lightning_gpt.training.run import train


def train_silently(config: TrainConfig, callback: Callback) -> None:
    """Train with one more callback, and discard the terminal output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        train(config, callbacks=[callback])
