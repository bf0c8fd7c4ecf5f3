"""Machines that a dry run can plan for: ``--on CARD:GPUS`` or ``--on CARD:GPUSxNODES``."""

import re
from dataclasses import dataclass

import torch

from lightning_gpt.config import UserError
from lightning_gpt.strategies.cards import CARDS, card_named
from lightning_gpt.strategies.devices import Devices

# Memory that the CUDA context and the communication library take before the first tensor.
RESERVED_GIB = 1.0


@dataclass(frozen=True)
class Machine:
    """Machines of one kind.

    Attributes:
        card: Key of ``CARDS``.
        gpus: GPUs of one machine.
        nodes: Number of machines.
    """

    card: str
    gpus: int
    nodes: int = 1

    @property
    def memory(self) -> int:
        """Bytes of one GPU that tensors can fill."""
        return int((CARDS[self.card].memory_gib - RESERVED_GIB) * 2**30)


def parse_machine(text: str) -> Machine:
    """Return the machine that ``--on`` names.

    Raises:
        UserError: The card is unknown, or the text has another form.
    """
    found = re.fullmatch(r"([\w-]+):([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if not found:
        raise UserError(f"--on {text}: not a machine; give CARD:GPUS or CARD:GPUSxNODES, such as h100:8 or a100-40:8x4")
    if found[1] not in CARDS:
        raise UserError(f"--on {text}: no such card; choose one of {', '.join(CARDS)}")
    return Machine(found[1], int(found[2]), int(found[3] or 1))


def machine_here(where: Devices) -> Machine | None:
    """Return the machine with this one's GPUs; None if it has none, they are unknown, or the run does not use them."""
    if where.device_type != "cuda" or not torch.cuda.is_available():
        return None
    card = card_named(torch.cuda.get_device_name())
    return Machine(card, where.per_node, where.num_nodes) if card else None
