"""Read what torchrun and SLURM say about this process: which launch it belongs to, and how often that was restarted."""

import os
from pathlib import Path


def launches() -> dict[str, int]:
    """Return the launches that this process belongs to, each with the number of its restarts.

    A launch is one call of torchrun, or one SLURM job. All its ranks see the same name. It keeps its name when torchrun
    restarts its processes or SLURM requeues its job, which both repeat the command as it was.
    """
    found = {}
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id:
        found[f"torchrun {_torchrun_name(run_id)}"] = _count("TORCHELASTIC_RESTART_COUNT")
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        found[f"slurm {job}"] = _count("SLURM_RESTART_COUNT")
    return found


def restarted() -> bool:
    """Return whether torchrun or SLURM started this process again after it had failed or was pre-empted."""
    return any(launches().values())


def _torchrun_name(run_id: str) -> str:
    """Return the run id, or if it is torchrun's default on a single node, the name of its temporary log folder."""
    log = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # .../RUNID_RANDOM/attempt_0/0/error.json
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return log.parents[2].name if run_id == "none" and one_node and len(log.parents) > 2 else run_id


def _count(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
