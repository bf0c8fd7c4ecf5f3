"""minGPT's Trainer: a plain loop over random samples, on one device, with callbacks."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mingpt.utils import CfgNode

_ENDLESS = 10**10  # samples


def configure_optimizers(model: nn.Module, train_config: Any) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the weights of Linear layers only.

    Args:
        model: The model.
        train_config: Has ``learning_rate``, ``betas`` and ``weight_decay``, like ``Trainer.get_default_config()``.
    """
    from lightning_gpt.implementations.registry import decay_linear
    from lightning_gpt.optim.adamw import adamw
    from lightning_gpt.optim.groups import parameter_groups

    groups = parameter_groups(model, decays=decay_linear, weight_decay=train_config.weight_decay)
    return adamw(groups, learning_rate=train_config.learning_rate, betas=train_config.betas)


class Trainer:
    """Train a model on random samples, and call callbacks after each iteration.

    It is for scripts written for minGPT. train.py resumes, validates, and runs on any number of devices.

    Args:
        config: As from `get_default_config`.
        model: Any model with ``forward(idx, targets) -> (logits, loss)`` and ``configure_optimizers(config)``.
        train_dataset: Samples (idx, targets), each (T,) int64.

    Attributes:
        callbacks: Lists of callbacks by event.
        device: Device of the model, such as "cuda".
        iter_dt: Duration of the last iteration in seconds.
        iter_num: Number of the iteration, from 0.
        iter_time: Time of the end of the last iteration, as from ``time.time()``.
        loss: Loss of the iteration, a scalar.
        optimizer: Optimizer of the run; None before it.
    """

    loss: Tensor

    @staticmethod
    def get_default_config() -> CfgNode:
        """Return minGPT's settings; ``max_iters`` None trains until it is interrupted."""
        return CfgNode(
            device="auto",
            num_workers=4,
            max_iters=None,
            batch_size=64,
            learning_rate=3e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            grad_norm_clip=1.0,
        )

    def __init__(self, config: CfgNode, model: nn.Module, train_dataset: Dataset) -> None:
        self.config = config
        self.train_dataset = train_dataset
        self.callbacks: defaultdict[str, list[Callable[[Trainer], Any]]] = defaultdict(list)
        self.device = config.device
        if config.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.iter_num = 0
        self.iter_time = 0.0
        self.iter_dt = 0.0
        print("running on device", self.device)

    def add_callback(self, onevent: str, callback: "Callable[[Trainer], Any]") -> None:
        """Call a function with the Trainer at an event, after those that are there; ``on_batch_end`` is the event."""
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback: "Callable[[Trainer], Any]") -> None:
        """Call only this function at an event."""
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        """Call the functions of an event."""
        for callback in self.callbacks[onevent]:
            callback(self)

    def run(self) -> None:
        """Train from the first iteration on, with a new optimizer."""
        config, model = self.config, self.model
        configure: Callable[[CfgNode], torch.optim.Optimizer] = model.configure_optimizers  # type: ignore[assignment]
        optimizer = self.optimizer = configure(config)
        loader: DataLoader = DataLoader(
            self.train_dataset,
            sampler=RandomSampler(self.train_dataset, replacement=True, num_samples=_ENDLESS),  # type: ignore[arg-type]
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            pin_memory=torch.device(self.device).type == "cuda",
        )
        model.train()
        self.iter_num = 0
        self.iter_time = time.time()
        for idx, targets in loader:
            _, self.loss = model(idx.to(self.device), targets.to(self.device))
            model.zero_grad(set_to_none=True)
            self.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm_clip)
            optimizer.step()
            self.trigger_callbacks("on_batch_end")
            self.iter_num += 1
            now = time.time()
            self.iter_dt, self.iter_time = now - self.iter_time, now
            if config.max_iters is not None and self.iter_num >= config.max_iters:
                break
