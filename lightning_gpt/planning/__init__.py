"""Plan a run before anything is built: parameters, FLOPs, memory, the largest batch, time and cost."""

from lightning_gpt.planning.cost import Cost, cost_table
from lightning_gpt.planning.machines import Machine, machine_here, parse_machine
from lightning_gpt.planning.plan import Plan, Traces, facts, flops_per_token, largest_batch, plan
from lightning_gpt.planning.side_by_side import Candidate, side_by_side, table
from lightning_gpt.planning.timing import Rates, Timing, step_time

__all__ = [
    "Candidate",
    "Cost",
    "Machine",
    "Plan",
    "Rates",
    "Timing",
    "Traces",
    "cost_table",
    "facts",
    "flops_per_token",
    "largest_batch",
    "machine_here",
    "parse_machine",
    "plan",
    "side_by_side",
    "step_time",
    "table",
]
