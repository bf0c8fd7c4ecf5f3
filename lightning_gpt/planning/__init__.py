"""Plan a run before anything is built: parameters, FLOPs, memory per device and on the host, and the largest batch."""

from lightning_gpt.planning.plan import Plan, Traces, flops_per_token, largest_batch, plan

__all__ = ["Plan", "Traces", "flops_per_token", "largest_batch", "plan"]
