"""What one training step of the bare model allocates and computes on one rank. Nothing here imports torch."""

from dataclasses import dataclass
from typing import NamedTuple


class Operation(NamedTuple):
    """One kernel of a step.

    Attributes:
        flops: Of matrix products, including attention; 0 for others.
        bytes: That it reads and writes.
        half: Whether its result is in half precision.
    """

    flops: int
    bytes: int
    half: bool


class Moment(NamedTuple):
    """Live memory after one operation of a step.

    Attributes:
        activations: Bytes that are neither parameters nor finished gradients.
        made: Gradient elements finished so far.
        open: Gradient elements of units that are not finished yet.
        closed: Gradient elements of the unit that was finished last.
    """

    activations: int
    made: int = 0
    open: int = 0
    closed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One micro-batch of the bare model on one rank.

    Attributes:
        parameters: Elements of each parameter; tied ones count once.
        units: Elements of each block, the unit that is gathered at a time.
        forward: Memory after each operation of the forward pass.
        backward: Memory after each operation of the backward pass.
        accumulate: Micro-batches per optimizer step.
        weight_bytes: Bytes per element of the stored weights.
        compute_bytes: Bytes per element of the weights that are computed with.
        state: Bytes of the optimizer state of all parameters.
        step: Peak bytes of temporaries in an optimizer step of all parameters.
        recomputed: Whether blocks recompute their activations.
        operations: Kernels of the forward and the backward pass, each with its number of runs.
        updates: The same of an optimizer step of all parameters.
    """

    parameters: tuple[int, ...]
    units: tuple[int, ...]
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    accumulate: int
    weight_bytes: int
    compute_bytes: int
    state: int
    step: int
    recomputed: bool = False
    operations: tuple[tuple[Operation, int], ...] = ()
    updates: tuple[tuple[Operation, int], ...] = ()

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(self.parameters)

    @property
    def activations(self) -> int:
        """Peak bytes of activations, including temporaries of the backward pass."""
        return max(moment.activations for moment in (*self.forward, *self.backward))
