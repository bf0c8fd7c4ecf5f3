"""GPUs that a dry run can plan for: ``--on CARD:GPUS`` or ``--on CARD:GPUSxNODES``."""

import re
from dataclasses import dataclass

from lightning_gpt.config import UserError

# Memory that the CUDA context and the communication library take before the first tensor.
RESERVED_GIB = 1.0


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        memory_gib: Memory that ``torch.cuda.get_device_properties`` reports, less than the data sheet's.
        has_bf16: Whether its tensor cores multiply bfloat16 (compute capability 8.0 or more).
    """

    memory_gib: float
    has_bf16: bool = True


# Capacities as torch reports them; NVIDIA's data sheets name 80 GB for an H100, 141 GB for an H200, and so on.
CARDS = {
    "b200": Card(178.3),
    "h200": Card(139.8),
    "h100": Card(79.1),
    "a100-80": Card(79.1),
    "a100-40": Card(39.4),
    "l40s": Card(44.3),
    "a10g": Card(22.0),
    "l4": Card(22.0),
    "4090": Card(23.6),
    "3090": Card(23.6),
    "v100-32": Card(31.7, has_bf16=False),
    "v100-16": Card(15.7, has_bf16=False),
    "t4": Card(14.5, has_bf16=False),
}


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
