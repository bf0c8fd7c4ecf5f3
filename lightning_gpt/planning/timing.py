"""Estimate the time of a training step by a roofline: a kernel takes as long as its arithmetic or its memory traffic.

Rates are the shares of a card's peaks in ``Rates``. The kernels of a step, the exchanges between ranks, the optimizer
step and what offloading adds follow each other; nothing is overlapped (Williams et al. 2009, "Roofline: an insightful
visual performance model"; for the volumes see ZeRO, arXiv:1910.02054, section 7).
"""

import math
from dataclasses import dataclass

from lightning_gpt.planning.machines import Machine
from lightning_gpt.strategies.cards import CARDS, Card
from lightning_gpt.strategies.memory import Traffic
from lightning_gpt.strategies.step import Operation, StepTrace

MACHINE_NETWORK = 12.5  # GB/s, 100 Gbit/s: what a machine sends to others, where its cards have no network of their own


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What runs achieve. Shares are of the card's peaks; docs/planning.md says where each value comes from.

    Attributes:
        compute: Share of the peak of matrix products.
        memory: Share of the bandwidth of the card's memory.
        link: Share of the bandwidth between ranks.
        kernel: Seconds that Python needs to start a kernel; the device waits if it is faster.
        latency: Seconds until an exchange begins, for each doubling of the ranks.
        fetch: Seconds on the host for a weight that stage 3 gathers.
        step: Further seconds of a step, such as for loading data.
        offload: Further seconds of a step that is offloaded.
        host_elements: Elements whose optimizer step the host of a machine computes in a second.
    """

    compute: float = 0.6
    memory: float = 0.8
    link: float = 0.52
    kernel: float = 25e-6
    latency: float = 20e-6
    fetch: float = 220e-6
    step: float = 0.001
    offload: float = 0.0
    host_elements: float = 1.43e9


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one optimizer step, by what they are spent on.

    Attributes:
        arithmetic: Kernels that the arithmetic limits.
        memory: Kernels that the memory's bandwidth limits, and the optimizer step.
        python: The time by which the host falls behind the device, and its own work.
        link: Exchanges between the ranks.
        host: Optimizer steps on the host, and copies to and from its memory.
    """

    arithmetic: float
    memory: float
    python: float
    link: float
    host: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.arithmetic + self.memory + self.python + self.link + self.host

    @property
    def bound(self) -> str:
        """Name of the largest part."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))


def step_time(
    trace: StepTrace, traffic: Traffic, *, machine: Machine, tf32: bool = True, rates: Rates | None = None
) -> Timing:
    """Return the time of an optimizer step.

    Args:
        trace: One micro-batch of the model.
        traffic: What one rank exchanges.
        machine: The machines.
        tf32: Whether products of float32 use TF32.
        rates: What runs achieve; None for the defaults.
    """
    card, rates = CARDS[machine.card], rates or Rates()
    arithmetic, memory = _on_device(trace.operations, card, rates, tf32=tf32)
    kernels = sum(count for _, count in trace.operations)
    waiting = max(kernels * rates.kernel - arithmetic - memory, 0)
    updates = sum(_on_device(trace.updates, card, rates, tf32=tf32)) * traffic.updated
    ranks = machine.gpus * machine.nodes
    # Machines exchange their share through the network of all their GPUs, while these exchange theirs.
    slowest = card.link if machine.nodes == 1 else min(card.link, machine.gpus * network(machine))
    sending = traffic.sent / (slowest * 1e9 * rates.link) if ranks > 1 else 0
    beginning = traffic.collectives * rates.latency * math.ceil(math.log2(ranks)) if ranks > 1 else 0
    offloading = rates.offload * (traffic.offloaded > 0) + traffic.offloaded * machine.gpus / rates.host_elements
    return Timing(
        arithmetic=arithmetic * trace.accumulate,
        memory=memory * trace.accumulate + updates,
        python=waiting * trace.accumulate + rates.step + traffic.fetches * rates.fetch,
        link=sending + beginning,
        host=offloading + traffic.host / (card.pcie * 1e9 * rates.link),
    )


def network(machine: Machine) -> float:
    """Return what one GPU can send to other machines, in GB/s."""
    return CARDS[machine.card].network or MACHINE_NETWORK / machine.gpus


def _on_device(
    operations: tuple[tuple[Operation, int], ...], card: Card, rates: Rates, *, tf32: bool
) -> tuple[float, float]:
    """Return the seconds of kernels that the arithmetic limits, and of those that the memory limits."""
    arithmetic = memory = 0.0
    wide = card.tf32 if tf32 else card.single
    for operation, count in operations:
        computing = operation.flops / ((card.half if operation.half else wide) * 1e12 * rates.compute)
        moving = operation.bytes / (card.bandwidth * 1e9 * rates.memory)
        if computing > moving:
            arithmetic += computing * count
        else:
            memory += moving * count
    return arithmetic, memory
