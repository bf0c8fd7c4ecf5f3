"""Plan a run before anything is built: parameters, FLOPs, memory per device and on the host, and the largest batch."""

from lightning_gpt.planning.machines import Machine, parse_machine
from lightning_gpt.planning.plan import Plan, Traces, facts, flops_per_token, largest_batch, plan
from lightning_gpt.planning.side_by_side import Candidate, side_by_side, table

__all__ = [
    "Candidate",
    "Machine",
    "Plan",
    "Traces",
    "facts",
    "flops_per_token",
    "largest_batch",
    "parse_machine",
    "plan",
    "side_by_side",
    "table",
]
