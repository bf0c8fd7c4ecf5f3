"""How each way of training divides memory over its ranks: bytes from the parameters and the trace of one step.

A rule turns a ``StepTrace`` (what one rank's model saves and makes, without any strategy) into a ``Memory``. Shares of
weights, gradients and optimizer state are those of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models" (arXiv:1910.02054), sections 3 and 5; buffers are what PyTorch 2.13 (FSDP2) and DeepSpeed
0.19 allocate. Nothing here needs torch.
"""

from dataclasses import dataclass
from typing import NamedTuple

MASTER = 4  # bytes of a float32 element, in which DeepSpeed keeps its own copy of the weights, and Adam's moments
MOMENTS = 2  # Adam keeps a mean and a mean square of every gradient element, and DeepSpeed runs nothing but Adam


class Moment(NamedTuple):
    """What is alive after one operation of a step.

    Attributes:
        activations: Bytes that are neither parameters nor finished gradients.
        made: Gradient elements finished so far.
        open: Those of them whose unit is not finished yet.
        closed: Elements of the unit that was finished last.
    """

    activations: int
    made: int = 0
    open: int = 0
    closed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One micro-batch of the bare model on one rank.

    Attributes:
        parameters: Elements of each parameter, tied ones once.
        units: Elements of each block, the unit that is gathered at a time.
        forward: The moments of the forward pass.
        backward: The moments of the backward pass.
        accumulate: Micro-batches per optimizer step.
        weight_bytes: Bytes of an element of the weights that are kept.
        compute_bytes: Bytes of an element of the weights that are computed with.
        state: Bytes of the optimizer's state of all parameters.
        step: Bytes that an optimizer step of all parameters makes for a while.
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

    @property
    def total(self) -> int:
        """All parameters, in elements."""
        return sum(self.parameters)

    @property
    def activations(self) -> int:
        """Bytes of activations at their highest, temporary ones of the backward pass included."""
        return max(moment.activations for moment in (*self.forward, *self.backward))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank: ``peak`` is the highest sum within a step, which not all parts reach at the same time.

    Attributes:
        weights: Weights, with DeepSpeed's resident copies in computing precision.
        gradients: Gradients between backward pass and optimizer step.
        optimizer: The optimizer's state, and the float32 copy of the weights where there is one.
        activations: What the forward pass saves, and the backward pass makes for a while.
        buffers: Gathered weights, and buckets of gradients on their way.
        resident: What is there between two steps.
        peak: The highest within a step.
        host_resident: In the host's memory between two steps.
        host_peak: In the host's memory, the highest within a step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    resident: int
    peak: int
    host_resident: int = 0
    host_peak: int = 0


class MemoryRules:
    """What a row of the registry says of its memory. Each kind of strategy is a subclass."""

    def computes_in_half(self, precision: str) -> bool:
        """Whether weights are computed with in half precision, not only some operations by autocast."""
        return precision in ("bf16-true", "16-true")

    def keeps_half(self, precision: str) -> bool:
        """Whether the weights themselves are kept in half precision."""
        return precision in ("bf16-true", "16-true")

    def autocasts(self, precision: str) -> bool:
        """Whether the forward pass runs under autocast."""
        return precision in ("bf16-mixed", "16-mixed")

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Bytes of one rank.

        Args:
            trace: One micro-batch of the model in this rule's precision.
            ranks: How many share the work.
        """
        raise NotImplementedError


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def _with_optimizer(trace: StepTrace, *, weights: int, optimizer: int, buffers: int, passes: int) -> Memory:
    """A rank whose gradients are as large as its weights.

    Args:
        trace: The step.
        weights: Bytes of the weights it keeps.
        optimizer: Bytes of its share of the optimizer's state.
        buffers: Bytes of gathered weights.
        passes: Bytes at the highest of forward and backward pass, gradients included.
    """
    resident = weights + weights + optimizer
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations=trace.activations,
        buffers=buffers,
        resident=resident,
        peak=max(resident + trace.step, weights + optimizer + passes),
    )


@dataclass(frozen=True, kw_only=True)
class Replicated(MemoryRules):
    """Everything on every rank.

    Attributes:
        bucketed: Gradients live in communication buckets, and so from step to step (DDP).
    """

    bucketed: bool = False

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Weights, gradients and the optimizer's state: with Adam (1 + 1 + 2) times the parameters."""
        weights = gradients = trace.total * trace.weight_bytes
        keeps = self.bucketed or trace.accumulate > 1
        # Without buckets the last step's gradients live through the forward pass, then are freed and made again.
        forward = gradients + max(m.activations for m in trace.forward)
        backward = max(m.activations + (gradients if keeps else m.made * trace.weight_bytes) for m in trace.backward)
        passes = max(forward, backward)
        return _with_optimizer(trace, weights=weights, optimizer=trace.state, buffers=0, passes=passes)


@dataclass(frozen=True, kw_only=True)
class ShardedUnits(MemoryRules):
    """FSDP2: every rank keeps its share of everything, and gathers one unit ahead of the one at work.

    What is in no block is one more unit, the root, which stays gathered from the forward to the end of the backward
    pass. A unit at work is there twice: as it was gathered, and as the parameters that were cut out of it; in the
    backward pass the next one is gathered while it works (``torch.distributed.fsdp._fully_shard._fsdp_param_group``).
    """

    def computes_in_half(self, precision: str) -> bool:
        """Also bf16-mixed, whose ``MixedPrecisionPolicy`` gathers in bfloat16."""
        return super().computes_in_half(precision) or precision == "bf16-mixed"

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """ZeRO's stage 3 shares, 4 times the parameters over the ranks with Adam, and the units that are gathered.

        An optimizer that makes more in a step than its state gathers whole matrices for it.
        """
        shard = _share(trace.total, ranks)
        weights = gradients = shard * trace.weight_bytes
        root, unit = trace.total - sum(trace.units), max(trace.units, default=0)
        gathered = (root + 2 * unit) * trace.compute_bytes
        forward = gradients + gathered + max(m.activations for m in trace.forward)

        def in_backward(m: Moment) -> int:
            sharded = (m.made - m.open) // ranks * trace.weight_bytes if trace.accumulate == 1 else gradients
            # The unit finished last is still there, whole, as what the reduce-scatter reads.
            return m.activations + m.open * trace.compute_bytes + m.closed * trace.weight_bytes + sharded

        backward = gathered + max(map(in_backward, trace.backward))
        return _with_optimizer(
            trace,
            weights=weights,
            optimizer=_share(trace.state, ranks),
            buffers=gathered + unit * trace.weight_bytes,
            passes=max(forward, backward),
        )


@dataclass(frozen=True, kw_only=True)
class Zero(MemoryRules):
    """DeepSpeed's ZeRO, which keeps a float32 partition of the weights besides them, in float32 training too.

    Attributes:
        stage: 1 divides the optimizer state, 2 the gradients too, 3 the weights too.
        offload: Optimizer state and float32 weights, in stage 3 the weights too, are in the host's memory.
        bucket: Gradient elements that are reduced together (``reduce_bucket_size``), at most all of them.
        buckets: How many such buffers there are: two under ``overlap_comm`` in stages 1 and 2.
        prefetch: Elements that stage 3 gathers ahead (``stage3_prefetch_bucket_size``).
        live: Elements that stage 3 leaves gathered for the backward pass (``stage3_max_live_parameters``).
        persistent: Parameters below this many elements are never divided (``stage3_param_persistence_threshold``).
    """

    stage: int
    offload: bool = False
    bucket: int = 200_000_000
    buckets: int = 2
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    persistent: int = 100_000

    def computes_in_half(self, precision: str) -> bool:
        """Mixed precision too: DeepSpeed casts the model, and keeps its float32 partition besides."""
        return "16" in precision

    def keeps_half(self, precision: str) -> bool:
        """As it computes."""
        return "16" in precision

    def autocasts(self, precision: str) -> bool:
        """Never."""
        return False

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """The stage's shares, DeepSpeed's buffers, and what of all that is in the host's memory."""
        return self._weights_divided(trace, ranks) if self.stage == 3 else self._weights_whole(trace, ranks)

    def _weights_whole(self, trace: StepTrace, ranks: int) -> Memory:
        """Stages 1 and 2 (``deepspeed/runtime/zero/stage_1_and_2.py``)."""
        total, element = trace.total, trace.compute_bytes
        part = _share(total, ranks)
        weights, master, moments = total * element, part * MASTER, MOMENTS * part * MASTER
        bucket = min(self.bucket, total)
        buckets, filled = self.buckets * bucket * element, bucket * element
        # Only stage 1 keeps whole gradients, and only until the last micro-batch, since it reduces once per step.
        whole = total * element if self.stage == 1 and trace.accumulate > 1 else 0
        kept = part * element if trace.accumulate > 1 and self.stage > 1 else 0
        # A full bucket is flattened once more to be reduced, and this rank's share of it is kept.
        flushed = filled + part * element
        backward = max(m.activations + (flushed if m.made > bucket else 0) for m in trace.backward)
        backward = whole + kept + buckets + max(backward, filled)
        forward = whole + kept + max(m.activations for m in trace.forward)
        # This rank's gradients, and once more in the type that the optimizer reads.
        step = part * element + part * MASTER
        if not self.offload:
            resident = weights + master + moments
            return Memory(
                weights=weights,
                gradients=part * element,
                optimizer=master + moments,
                activations=trace.activations,
                buffers=buckets,
                resident=resident,
                peak=resident + max(forward, backward, step),
            )
        # One buffer as large as the largest parameter on either side, to copy gradients through.
        copied = max(trace.parameters) * element
        # Beside the optimizer's own: its gradients in float32, and the new weights on their way to the device.
        host = master + moments + part * MASTER + part * element + copied
        if trace.accumulate > 1:
            host += total * element // ranks
        return Memory(
            weights=weights,
            gradients=part * element,
            optimizer=0,
            activations=trace.activations,
            buffers=buckets + copied,
            resident=weights + copied,
            peak=weights + copied + max(forward, backward),
            host_resident=host,
            host_peak=host,
        )

    def _weights_divided(self, trace: StepTrace, ranks: int) -> Memory:
        """Stage 3 (``deepspeed/runtime/zero/stage3.py``)."""
        element = trace.compute_bytes
        small = sum(p for p in trace.parameters if p < self.persistent)
        divided = trace.total - small
        part = _share(trace.total, ranks)
        shards, moments = part * element, MOMENTS * part * MASTER
        # In float32, too, the optimizer works on a copy: DeepSpeed means to share, but compares a device with a text.
        master = part * MASTER
        # The gradients' partition stays, and on the host the one in float32, which the optimizer reads, stays as well.
        gradients, read = part * element, part * MASTER
        bucket, whole = min(self.bucket, trace.total) * element, small * element
        live = min(divided, self.live) * element
        ahead = min(divided, max(self.prefetch, max(trace.parameters))) * element
        # What is gathered lies in one flat tensor and, rearranged, in the parameters.
        forward = live + ahead + max(m.activations for m in trace.forward)
        again = ahead if divided > self.live else 0
        backward = live + again + max(m.activations for m in trace.backward)
        device, host = bucket + whole, shards + master + moments + gradients
        device, host = (device, host + read) if self.offload else (device + host, 0)
        step = 0 if self.offload else read
        return Memory(
            weights=whole + (0 if self.offload else shards),
            gradients=0 if self.offload else gradients,
            optimizer=0 if self.offload else master + moments,
            activations=trace.activations,
            buffers=bucket + live + ahead,
            resident=device,
            peak=device + max(forward, backward, step),
            host_resident=host,
            host_peak=host,
        )
