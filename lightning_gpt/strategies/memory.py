"""Compute the memory per rank of each strategy, in bytes, and what ranks exchange, from the trace of one step.

A rule turns a ``StepTrace`` (what one rank's model allocates without any strategy) into a ``Memory``. Shares of
weights, gradients and optimizer state follow Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models" (arXiv:1910.02054), sections 3 and 5; buffers follow the code of PyTorch 2.13 (FSDP2) and
DeepSpeed 0.19. Nothing here imports torch.
"""

from dataclasses import dataclass

from lightning_gpt.strategies.step import Moment, StepTrace

MASTER = 4  # bytes of a float32 element: DeepSpeed's master weights and Adam's moments
MOMENTS = 2  # Adam, the only optimizer under DeepSpeed, keeps a mean and a mean square per element


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. The parts do not all peak at once, so ``peak`` is less than their sum.

    Attributes:
        weights: Weights, including DeepSpeed's resident copies in compute precision.
        gradients: Gradients between backward pass and optimizer step.
        optimizer: Optimizer state, and the float32 master weights and the average of the weights if there are any.
        activations: Saved activations, and temporaries of the backward pass.
        buffers: Gathered weights, and buckets of gradients to reduce.
        resident: Memory between two steps.
        peak: Peak memory within a step.
        host_resident: Host memory between two steps.
        host_peak: Peak host memory within a step.
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


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank exchanges in an optimizer step.

    Attributes:
        sent: Bytes that it sends to the other ranks, as much as it receives.
        collectives: Number of exchanges with the other ranks.
        fetches: Number of weights that are gathered one by one, which takes time on the host.
        updated: Share of the optimizer step that it runs on its device.
        offloaded: Elements whose optimizer step it runs on the host.
        host: Bytes that it exchanges with the host's memory in the busier direction.
    """

    sent: float = 0
    collectives: int = 0
    fetches: int = 0
    updated: float = 1
    offloaded: int = 0
    host: float = 0


class MemoryRules:
    """How a strategy uses memory and what it exchanges. Each kind of strategy is a subclass."""

    def computes_in_half(self, precision: str) -> bool:
        """Return whether the model computes with weights in half precision, not counting autocast."""
        return precision in ("bf16-true", "16-true")

    def keeps_half(self, precision: str) -> bool:
        """Return whether the stored weights are in half precision."""
        return precision in ("bf16-true", "16-true")

    def autocasts(self, precision: str) -> bool:
        """Return whether the forward pass runs under autocast."""
        return precision in ("bf16-mixed", "16-mixed")

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Return the memory of one rank.

        Args:
            trace: One micro-batch of the model, in this rule's precision.
            ranks: Number of ranks.
        """
        raise NotImplementedError

    def traffic(self, trace: StepTrace, *, ranks: int) -> Traffic:
        """Return what one rank exchanges in an optimizer step, with the volumes of ZeRO, section 7.

        Args:
            trace: One micro-batch of the model, in this rule's precision.
            ranks: Number of ranks.
        """
        raise NotImplementedError


BUCKET = 25 << 20  # bytes of gradients that DDP reduces together


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def _with_optimizer(
    trace: StepTrace,
    *,
    weights: int,
    optimizer: int,
    buffers: int,
    passes: int,
    step: int | None = None,
    kept: int = 0,
) -> Memory:
    """Return the memory of a rank whose gradients are as large as its weights.

    Args:
        trace: The step.
        weights: Bytes of the rank's weights.
        optimizer: Bytes of the rank's optimizer state.
        buffers: Bytes of gathered weights and buckets.
        passes: Peak bytes in forward and backward pass, including gradients.
        step: Peak bytes of temporaries in an optimizer step; None for those of all parameters.
        kept: Bytes of buffers that persist between steps.
    """
    resident = weights + weights + optimizer + kept
    step = trace.step if step is None else step
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations=trace.activations,
        buffers=buffers,
        resident=resident,
        peak=max(resident + step, weights + optimizer + kept + passes),
    )


@dataclass(frozen=True, kw_only=True)
class Replicated(MemoryRules):
    """Every rank holds the whole model, its gradients and its optimizer state.

    Attributes:
        bucketed: Whether gradients live in communication buckets, which persist between steps (DDP).
        separate_buckets: Further copies of the gradients in buckets, as DDP makes them without
            ``gradient_as_bucket_view``: two at the peak, where the first step's buckets and the rebuilt ones coexist.
        averaged: Whether every rank also holds an average of the weights (``--ema``).
    """

    bucketed: bool = False
    separate_buckets: int = 0
    averaged: bool = False

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Return weights, gradients and optimizer state: with Adam (1 + 1 + 2) times the parameters."""
        weights = gradients = trace.total * trace.weight_bytes
        keeps = self.bucketed or trace.accumulate > 1
        # Without buckets, the last step's gradients live through the forward pass; then they are freed and reallocated.
        forward = gradients + max(m.activations for m in trace.forward)
        backward = max(m.activations + (gradients if keeps else m.made * trace.weight_bytes) for m in trace.backward)
        buckets = self.separate_buckets * gradients
        passes = max(forward, backward)
        optimizer = trace.state + (weights if self.averaged else 0)
        return _with_optimizer(
            trace, weights=weights, optimizer=optimizer, buffers=buckets, passes=passes, kept=buckets
        )

    def traffic(self, trace: StepTrace, *, ranks: int) -> Traffic:
        """Return an all-reduce of the gradients: a reduce-scatter and a gather."""
        gradients = trace.total * trace.weight_bytes
        return Traffic(sent=2 * gradients * (ranks - 1) / ranks, collectives=-(-gradients // BUCKET))


@dataclass(frozen=True, kw_only=True)
class ShardedUnits(MemoryRules):
    """FSDP2: every rank keeps its shards, and gathers one unit ahead of the one that runs.

    Parameters outside of blocks form the root unit, which stays gathered from the forward pass to the end of the
    backward pass. The running unit takes memory twice: the gathered buffer, and the parameters copied out of it. In the
    backward pass the next unit is gathered meanwhile (``torch.distributed.fsdp._fully_shard._fsdp_param_group``).
    """

    def computes_in_half(self, precision: str) -> bool:
        """Return True also for bf16-mixed, whose ``MixedPrecisionPolicy`` gathers in bfloat16."""
        return super().computes_in_half(precision) or precision == "bf16-mixed"

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Return the shards (as in ZeRO stage 3) and the gathered units.

        An optimizer with large temporaries, such as Muon, divides its matrices among the ranks.
        """
        shard = _share(trace.total, ranks)
        weights = gradients = shard * trace.weight_bytes
        root, unit = trace.total - sum(trace.units), max(trace.units, default=0)
        gathered = (root + 2 * unit) * trace.compute_bytes
        forward = gradients + gathered + max(m.activations for m in trace.forward)

        def in_backward(m: Moment) -> int:
            sharded = (m.made - m.open) // ranks * trace.weight_bytes if trace.accumulate == 1 else gradients
            # The gradients of the unit finished last are still whole, because the reduce-scatter reads them.
            return m.activations + m.open * trace.compute_bytes + m.closed * trace.weight_bytes + sharded

        backward = gathered + max(map(in_backward, trace.backward))
        return _with_optimizer(
            trace,
            weights=weights,
            optimizer=_share(trace.state, ranks),
            buffers=gathered + unit * trace.weight_bytes,
            passes=max(forward, backward),
            step=_share(trace.step, ranks),
        )

    def traffic(self, trace: StepTrace, *, ranks: int) -> Traffic:
        """Return, for each micro-batch, two gathers of the weights and a reduce-scatter of the gradients."""
        moved = trace.accumulate * trace.total * (2 * trace.compute_bytes + trace.weight_bytes)
        return Traffic(
            sent=moved * (ranks - 1) / ranks,
            collectives=3 * trace.accumulate * (len(trace.units) + 1),
            updated=1 / ranks,
        )


@dataclass(frozen=True, kw_only=True)
class Zero(MemoryRules):
    """DeepSpeed's ZeRO, which keeps a float32 copy of a rank's partition of the weights, even in float32 training.

    Attributes:
        stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights.
        offload: Whether optimizer state, master weights and gradients are in the host's memory.
        offload_weights: Whether the shards of the weights are, too; stage 3 only.
        bucket: Gradient elements that are reduced together (``reduce_bucket_size``).
        buckets: Number of such buffers: two under ``overlap_comm`` in stages 1 and 2.
        prefetch: Elements that stage 3 gathers ahead (``stage3_prefetch_bucket_size``).
        live: Elements that stage 3 leaves gathered for the backward pass (``stage3_max_live_parameters``).
        reuse: Stage 3 releases weights that it next uses after more elements (``stage3_max_reuse_distance``).
        persistent: Parameters with fewer elements are never sharded (``stage3_param_persistence_threshold``).
        capped: Whether the buffers are at most as large as the model, as our strategy makes them.
        flat_copies: Whether stages 1 and 2 copy a full bucket to reduce it.
        flat_step: Whether stage 3 makes its gradients in the backward pass and copies them flat for the optimizer, as
            DeepSpeed did in 2021, instead of keeping a flat buffer.
    """

    stage: int
    offload: bool = False
    offload_weights: bool = False
    bucket: int = 200_000_000
    buckets: int = 2
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persistent: int = 100_000
    capped: bool = True
    flat_copies: bool = True
    flat_step: bool = False

    def computes_in_half(self, precision: str) -> bool:
        """Return True also for mixed precision: DeepSpeed casts the model, and keeps the float32 partition."""
        return "16" in precision

    def keeps_half(self, precision: str) -> bool:
        """Return the same as ``computes_in_half``."""
        return "16" in precision

    def autocasts(self, precision: str) -> bool:
        """Return False: DeepSpeed casts instead."""
        return False

    def memory(self, trace: StepTrace, *, ranks: int) -> Memory:
        """Return the memory of one rank, on the device and on the host."""
        return self._stage_3(trace, ranks) if self.stage == 3 else self._stages_1_and_2(trace, ranks)

    def traffic(self, trace: StepTrace, *, ranks: int) -> Traffic:
        """Return reduce-scatters of the gradients, gathers of the weights, and copies to and from the host.

        Stage 3 gathers the weights for each pass, and a recomputed forward pass is one more; stage 1 reduces once.
        """
        element, part = trace.compute_bytes, _share(trace.total, ranks)
        reduces = 1 if self.stage == 1 else trace.accumulate
        gathers = (2 + trace.recomputed) * trace.accumulate if self.stage == 3 else 1
        divided = sum(p >= self.persistent for p in trace.parameters)
        return Traffic(
            sent=(reduces + gathers) * trace.total * element * (ranks - 1) / ranks,
            collectives=reduces * -(-trace.total // self.bucket) + (gathers * divided if self.stage == 3 else 1),
            fetches=gathers * divided if self.stage == 3 else 0,
            updated=0 if self.offload else 1 / ranks,
            offloaded=part if self.offload else 0,
            host=part * element * (max(reduces, gathers) if self.offload_weights else reduces) if self.offload else 0,
        )

    def _stages_1_and_2(self, trace: StepTrace, ranks: int) -> Memory:
        """Return the memory of stages 1 and 2 (``deepspeed/runtime/zero/stage_1_and_2.py``)."""
        total, element = trace.total, trace.compute_bytes
        part = _share(total, ranks)
        weights, master, moments = total * element, part * MASTER, MOMENTS * part * MASTER
        bucket = min(self.bucket, total) if self.capped else self.bucket
        buckets, filled = self.buckets * bucket * element, bucket * element if self.flat_copies else 0
        # Only stage 1 keeps whole gradients, until the last micro-batch, because it reduces once per step.
        whole = total * element if self.stage == 1 and trace.accumulate > 1 else 0
        kept = part * element if trace.accumulate > 1 and self.stage > 1 else 0
        # A full bucket is copied flat to be reduced, and this rank keeps its shard.
        flushed = filled + part * element
        backward = max(m.activations + (flushed if m.made > bucket else 0) for m in trace.backward)
        backward = whole + kept + buckets + max(backward, filled)
        forward = whole + kept + max(m.activations for m in trace.forward)
        # This rank's gradients, and a float32 copy for the optimizer.
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
        # Gradients are copied through one buffer per side, as large as the largest parameter.
        copied = max(trace.parameters) * element
        # Master weights and moments, float32 gradients, and the new weights to copy to the device.
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

    def _stage_3(self, trace: StepTrace, ranks: int) -> Memory:
        """Return the memory of stage 3 (``deepspeed/runtime/zero/stage3.py``)."""
        element = trace.compute_bytes
        small = sum(p for p in trace.parameters if p < self.persistent)  # elements that are never sharded
        divided = trace.total - small
        part = _share(trace.total, ranks)
        shards, moments = part * element, MOMENTS * part * MASTER
        # A copy even in float32: DeepSpeed means to share it, but its check compares a device with a string.
        master = part * MASTER
        # The gradient partition is kept between steps; with offloading, so is the optimizer's float32 copy of it.
        gradients, float32_gradients = part * element, part * MASTER
        bucket = (min(self.bucket, trace.total) if self.capped else self.bucket) * element
        whole = small * element
        # A weight waits twice the elements behind it: from its use in the forward pass to that in the backward pass.
        live = max(min(divided, self.live, self.reuse // 2), min(divided, max(trace.parameters))) * element
        ahead = min(divided, max(self.prefetch, max(trace.parameters))) * element
        # Gathered weights take memory twice: in a flat tensor and, rearranged, in the parameters.
        forward = live + ahead + max(m.activations for m in trace.forward)
        again = ahead if divided * element > live else 0  # not all weights stay gathered for the backward pass
        fresh = element / ranks if self.flat_step else 0  # of a gradient element that the backward pass has made
        backward = live + again + max(m.activations + int(m.made * fresh) for m in trace.backward)
        state = master + moments + (0 if self.flat_step else gradients)
        device, host = (0, state + float32_gradients) if self.offload else (state, 0)
        device, host = (device, host + shards) if self.offload_weights else (device + shards, host)
        device += bucket + whole
        step = 0 if self.offload else float32_gradients + (2 * gradients if self.flat_step else 0)
        return Memory(
            weights=whole + (0 if self.offload_weights else shards),
            gradients=0 if self.offload else gradients,
            optimizer=0 if self.offload else master + moments,
            activations=trace.activations,
            buffers=bucket + live + ahead,
            resident=device,
            peak=device + max(forward, backward, step),
            host_resident=host,
            host_peak=host,
        )
