"""All strategies side by side: memory per device and on the host, the largest micro-batch that fits, and time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_gpt.planning.machines import Machine
from lightning_gpt.planning.plan import MOST, Traces
from lightning_gpt.planning.timing import Timing, step_time
from lightning_gpt.strategies.memory import Memory, MemoryRules


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy, or why it cannot run here.

    Attributes:
        name: Value of ``--strategy``.
        rules: Its memory rules.
        refused: Why it cannot run; empty if it can.
    """

    name: str
    rules: MemoryRules
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one strategy needs, with or without recomputation.

    Attributes:
        strategy: Value of ``--strategy``.
        recompute: Whether blocks recompute their activations.
        memory: Memory of one device, in bytes; None if the strategy cannot run.
        host: Peak host memory of one machine for offloading, in bytes.
        timing: Of an optimizer step; None if the card is unknown.
        largest: About how many sequences per device fit; None if the memory of a device is unknown.
        refused: Why the strategy cannot run.
    """

    strategy: str
    recompute: bool
    memory: Memory | None = None
    host: int = 0
    timing: Timing | None = None
    largest: int | None = None
    refused: str = ""


def side_by_side(
    traces: Traces,
    candidates: Sequence[Candidate],
    *,
    world_size: int,
    devices_per_node: int,
    batch_size: int,
    limit: int | None,
    machine: Machine | None,
    tf32: bool,
) -> list[Row]:
    """Plan every strategy, with and without recomputation.

    Args:
        traces: The model.
        candidates: The strategies.
        world_size: Number of devices of all nodes.
        devices_per_node: Number of devices of one node.
        batch_size: Sequences per device and micro-batch.
        limit: Bytes that a device has for the run; None if unknown.
        machine: The machines; None if their cards are unknown.
        tf32: Whether products of float32 use TF32.

    Raises:
        UserError: The model cannot be run on FakeTensors.
    """
    rows = []
    for candidate in candidates:
        if candidate.refused:
            rows.append(Row(strategy=candidate.name, recompute=False, refused=candidate.refused))
            continue
        for recompute in (False, True):

            def memory(batch: int, rules: MemoryRules = candidate.rules, recompute: bool = recompute) -> Memory:
                return rules.memory(traces.step(rules, batch_size=batch, recompute=recompute), ranks=world_size)

            trace = traces.step(candidate.rules, batch_size=batch_size, recompute=recompute)
            needed = candidate.rules.memory(trace, ranks=world_size)
            traffic = candidate.rules.traffic(trace, ranks=world_size)
            rows.append(
                Row(
                    strategy=candidate.name,
                    recompute=recompute,
                    memory=needed,
                    host=needed.host_peak * devices_per_node,
                    timing=step_time(trace, traffic, machine=machine, tf32=tf32) if machine else None,
                    largest=None if limit is None else _largest(lambda batch: memory(batch).peak, limit=limit),
                )
            )
    return rows


def _largest(peak: Callable[[int], int], *, limit: int) -> int:
    """Return about the largest batch whose peak is within the limit; 0 if none is.

    The peak rises almost linearly. It is interpolated between powers of two, whose traces all strategies share.
    """
    if peak(1) > limit:
        return 0
    known = [1, 16]
    while True:
        low, high = sorted(known[-2:])
        guess = low + (limit - peak(low)) * (high - low) // max(peak(high) - peak(low), 1)
        nearest = 1 << round(math.log2(guess)) if guess > 0 else 1
        if nearest in known or nearest > MOST:
            return max(1, min(guess, MOST))
        known.append(nearest)


# Width of each column of numbers; the first ones are fields of Memory.
_WIDTHS = {
    "weights": 9,
    "gradients": 11,
    "optimizer": 11,
    "activations": 13,
    "buffers": 9,
    "peak": 9,
    "host": 10,
    "batch": 9,
}


def table(rows: Sequence[Row], *, limit: int | None, batch_size: int) -> str:
    """Return the rows as text of at most 120 columns, with lines that explain them."""
    lines = [_line("strategy", "recompute", {name: name for name in _WIDTHS})]
    for row in rows:
        if row.memory is None:
            lines.append(f"{row.strategy:26}{row.refused}")
            continue
        numbers = {name: _gib(getattr(row.memory, name)) for name in list(_WIDTHS)[:-2]}
        fits = limit is None or row.memory.peak <= limit
        largest = "" if row.largest is None else f"{row.largest:,}{'' if fits else '!'}"
        largest = largest if row.largest != MOST else "any"
        numbers |= {"host": _gib(row.host) if row.host else "", "batch": largest}
        lines.append(_line(row.strategy, "yes" if row.recompute else "no", numbers))
    lines.append(
        f"GiB per device with {batch_size} sequences, and on the host per machine; parts do not all peak at once"
    )
    if limit is not None:
        lines.append(
            f"batch: about how many sequences per device and micro-batch fit into {_gib(limit)} GiB;"
            f" ! where {batch_size} do not fit"
        )
    return "\n".join(lines)


def _line(strategy: str, recompute: str, numbers: Mapping[str, str]) -> str:
    columns = "".join(f"{numbers[name]:>{width}}" for name, width in _WIDTHS.items())
    return f"{strategy:26}{recompute:10}{columns}".rstrip()


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3g}" if count < 1000 * 2**30 else f"{count / 2**30:,.0f}"
