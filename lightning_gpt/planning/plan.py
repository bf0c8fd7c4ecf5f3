"""What one run needs under one strategy: parameters, FLOPs, and memory per device and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.planning.machines import Machine
from lightning_gpt.planning.timing import Timing, step_time
from lightning_gpt.planning.trace import build_model, dtypes, trace_optimizer, trace_step
from lightning_gpt.strategies.memory import Memory, MemoryRules
from lightning_gpt.strategies.step import StepTrace

SOURCES = (
    "shares: ZeRO, arXiv:1910.02054; activations: counted on FakeTensors (cf. arXiv:2205.05198);"
    " FLOPs: 6N + 12 n_layer n_embd T, PaLM, arXiv:2204.02311, appendix B"
)
MOST = 1 << 20  # sequences of the largest batch that is tried
OPTIMAL_TOKENS = 20  # per parameter, as in table 3 of Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is in bytes per device; ``host`` is in bytes per node.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        tokens_per_step: Tokens per optimizer step over all devices.
        flops_per_step: The model's FLOPs per optimizer step over all devices, without recomputation.
        steps: Optimizer steps.
        memory: Memory of one device, and its share of host memory.
        host: Peak host memory for offloading, for all devices of a node.
        timing: Of an optimizer step; None if the cards are unknown.
    """

    parameters: int
    tokens_per_step: int
    flops_per_step: float
    steps: int
    memory: Memory
    host: int
    timing: Timing | None = None

    def table(self, *, cost: Sequence[tuple[str, str]] = ()) -> str:
        """Return the plan as lines of text.

        Args:
            cost: Further lines, as names and values.
        """
        m = self.memory
        rows = [
            ("weights", f"{_size(m.weights)} per device"),
            ("gradients", _size(m.gradients)),
            ("optimizer", _size(m.optimizer)),
            ("activations", _size(m.activations)),
            ("buffers", _size(m.buffers)),
            ("peak", f"{_size(m.peak)} per device; parts do not all peak at once"),
        ]
        if self.host:
            rows.append(("host", f"{_size(self.host)} per node, for offloading"))
        steps = facts(self.parameters, tokens=self.tokens_per_step, flops=self.flops_per_step, steps=self.steps)
        return f"{steps}\n{_lines([*rows, *cost, ('formulas', SOURCES)])}"


def facts(parameters: int, *, tokens: int, flops: float, steps: int) -> str:
    """Return what does not depend on the strategy, as lines of text.

    Args:
        parameters: Number of parameters.
        tokens: Tokens per optimizer step.
        flops: FLOPs per optimizer step.
        steps: Optimizer steps.
    """
    return _lines(
        [
            ("parameters", f"{parameters:,}"),
            ("tokens per step", f"{tokens:,}"),
            ("FLOPs per step", f"{flops:.3e}"),
            ("steps", f"{steps:,} ({steps * tokens:,} tokens)"),
            (
                "compute-optimal",
                f"{OPTIMAL_TOKENS * parameters:,} tokens, {OPTIMAL_TOKENS} per parameter (arXiv:2203.15556)",
            ),
        ]
    )


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def flops_per_token(model: nn.Module, *, block_size: int) -> float:
    """Return the training FLOPs per token: 6 N + 12 n_layer n_embd T (PaLM, Chowdhery et al. 2022, appendix B).

    N is the number of parameters without position embeddings, as in nanoGPT. If the model's config lacks n_layer or
    n_embd, the attention term is left out.

    Args:
        model: The unsharded model, on any device, including meta and fake ones.
        block_size: Tokens per sequence (T).
    """
    config = getattr(model, "config", None)
    n_layer, n_embd = getattr(config, "n_layer", 0) or 0, getattr(config, "n_embd", 0) or 0
    n = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("wpe.weight"))
    return 6 * n + 12 * n_layer * n_embd * block_size


class Traces:
    """The steps of one model without memory; each is traced once.

    Args:
        module: The module; its model may be on the meta device, since only implementation, config and optimizer count.
        block_size: Tokens per sequence.
        accumulate: Micro-batches per optimizer step.
        precision: Lightning's name of the precision.
        device_type: "cpu" or "cuda"; with dropout, their attention kernels keep different activations.
    """

    def __init__(
        self, module: GPTModule, *, block_size: int, accumulate: int, precision: str, device_type: str
    ) -> None:
        self._module = module
        self.block_size = block_size
        self.accumulate = accumulate
        self.precision = precision
        self._device_type = device_type
        self._steps: dict[tuple[object, ...], StepTrace] = {}
        self.flops_per_token = flops_per_token(module.model, block_size=block_size)

    def step(self, rules: MemoryRules, *, batch_size: int, recompute: bool) -> StepTrace:
        """Return the trace of a step.

        Args:
            rules: The strategy's memory rules, which determine the dtypes.
            batch_size: Sequences per device and micro-batch.
            recompute: Whether blocks recompute their activations.

        Raises:
            UserError: The model cannot be run on FakeTensors.
        """
        kept, computed = dtypes(rules, self.precision)
        key = (kept, computed, rules.autocasts(self.precision), batch_size, recompute)
        if key not in self._steps:
            self._steps[key] = self._trace(rules, batch_size=batch_size, recompute=recompute)
        return self._steps[key]

    def _trace(self, rules: MemoryRules, *, batch_size: int, recompute: bool) -> StepTrace:
        module, implementation = self._module, self._module.implementation
        kept, computed = dtypes(rules, self.precision)
        try:
            with FakeTensorMode():
                # FakeTensors run on the CPU, so a GPU-only kernel is replaced by one that keeps as much memory.
                fields = module.model_config | refused_by(module.model, device_type="cpu", dtype=computed)[1]
                model = build_model(implementation, fields, dtype=computed)
                return trace_step(
                    model,
                    optimizer=trace_optimizer(module, model, dtype=kept),
                    block_class=implementation.block_class(),
                    rules=rules,
                    shape=(batch_size, self.block_size),
                    accumulate=self.accumulate,
                    precision=self.precision,
                    recompute=recompute,
                    chunked_loss=module.head_loss is not None,
                    device_type=self._device_type,
                )
        except UserError:
            raise
        except Exception as error:  # a user's model may do anything, such as reading a value
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--dry_run cannot run --implementation {implementation.name} without memory:"
                f" {type(error).__name__}: {reason}"
            ) from error


def plan(
    traces: Traces,
    *,
    rules: MemoryRules,
    world_size: int,
    devices_per_node: int,
    batch_size: int,
    steps: int,
    recompute: bool,
    machine: Machine | None = None,
    tf32: bool = True,
) -> Plan:
    """Compute what a run needs, without allocating it.

    Args:
        traces: The model.
        rules: The strategy's memory rules.
        world_size: Number of devices of all nodes.
        devices_per_node: Number of devices of one node.
        batch_size: Sequences per device and micro-batch.
        steps: Optimizer steps.
        recompute: Whether blocks recompute their activations.
        machine: The machines, for the time of a step; None if their cards are unknown.
        tf32: Whether products of float32 use TF32.

    Raises:
        UserError: The model cannot be run on FakeTensors.
    """
    trace = traces.step(rules, batch_size=batch_size, recompute=recompute)
    memory = rules.memory(trace, ranks=world_size)
    timing = None
    if machine:
        timing = step_time(trace, rules.traffic(trace, ranks=world_size), machine=machine, tf32=tf32)
    tokens = batch_size * traces.block_size * traces.accumulate * world_size
    return Plan(
        parameters=trace.total,
        tokens_per_step=tokens,
        flops_per_step=traces.flops_per_token * tokens,
        steps=steps,
        memory=memory,
        host=memory.host_peak * devices_per_node,
        timing=timing,
    )


def largest_batch(
    traces: Traces, *, rules: MemoryRules, world_size: int, recompute: bool, limit: int, multiple: int = 1
) -> int:
    """Return the largest number of sequences per device whose peak memory is at most `limit` bytes; 0 if none fits.

    The peak rises about linearly with the batch, so a few traces find it.

    Args:
        traces: The model.
        rules: The strategy's memory rules.
        world_size: Number of devices of all nodes.
        recompute: Whether blocks recompute their activations.
        limit: Bytes of memory that a device has for the run.
        multiple: The batch is a multiple of this.
    """

    def peak(units: int) -> int:
        return rules.memory(traces.step(rules, batch_size=units * multiple, recompute=recompute), ranks=world_size).peak

    low, high, guess = 0, MOST // multiple, 8  # `low` fits, and `high` does not
    least = peak(1)
    if least > limit:
        return 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = peak(guess)
        low, high = (guess, high) if found <= limit else (low, guess)
        slope = max((found - least) / max(guess - 1, 1), 1)
        guess += round((limit - found) / slope) if abs(limit - found) > slope else (1 if found <= limit else -1)
    return low * multiple
