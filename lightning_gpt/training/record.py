"""What the config.yaml of a run records: the value of every option, and how the run was made."""

import contextlib
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

import lightning_gpt
from lightning_gpt.config import PROVENANCE, TrainConfig
from lightning_gpt.launch import launches
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.devices import Devices
from lightning_gpt.training.budget import Budget

# Options that say how one call runs, not what is trained; they are recorded as not given.
ONE_OFF: dict[str, Any] = {
    "out_dir": None,
    "resume": None,
    "decay_from": None,
    "overwrite": False,
    "trust_checkpoint": False,
    "verify": False,
    "tokenizer_file": None,
    "dry_run": False,
    "on": None,
    "price_per_gpu_hour": None,
}
_GIT_SECONDS = 10


def make_record(
    config: TrainConfig, *, given: dict[str, Any], step: int, facts: dict[str, Any], packages: Sequence[str]
) -> dict[str, Any]:
    """Return the content of ``config.yaml``.

    Args:
        config: The run, with every default resolved.
        given: The values of all options before they were resolved, from which a resumed run resolves them again.
        step: Optimizer step at which this session starts.
        facts: What the run found out, such as its devices.
        packages: Names of the packages whose versions matter.
    """
    options = config.flat() | ONE_OFF
    given = given | ONE_OFF
    saved = config.resumed.saved.get(PROVENANCE) if config.resumed else None
    earlier = saved.get("sessions", []) if isinstance(saved, dict) else []
    session = {
        "time": datetime.now(UTC).isoformat(),
        "step": step,
        "command": config.command,
        "launches": list(launches()),
    }
    provenance = {
        **facts,
        "versions": {"python": platform.python_version(), "lightning_gpt": lightning_gpt.__version__}
        | {name: version(name) for name in packages if _is_installed(name)},
        "git": _git_state(Path(lightning_gpt.__file__).parent),
        "as_given": {name: given[name] for name in options if given[name] != options[name]},
        "sessions": [*earlier, session],
    }
    return options | {PROVENANCE: provenance}


def summary_facts(
    config: TrainConfig, module: GPTModule, budget: Budget, where: Devices, *, run_dir: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``run.json`` says about a run before it has begun.

    Args:
        config: The run, with every default resolved.
        module: The module to train, whole or on the meta device.
        budget: Length and batch size of the run.
        where: The devices.
        run_dir: The run folder.
        record: Content of ``config.yaml``.
    """
    made = record[PROVENANCE]
    return {
        "name": run_dir.name,
        "implementation": module.implementation.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "model": module.model_config,
        "data": made["data"],
        "tokenizer": made["tokenizer"],
        "strategy": config.trainer.strategy,
        "devices": made["devices"],
        "world_size": where.world_size,
        "precision": where.precision,
        "optimizer": config.optim.optimizer,
        "learning_rate": config.optim.learning_rate,
        "tokens_per_step": budget.tokens_per_step,
        "seed": config.run.seed,
        "versions": made["versions"],
        "git": made["git"],
        "command": config.command,
        "sessions": len(made["sessions"]),
    }


def changed_options(record: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Return the options whose values differ from the saved ones, as ``NAME OLD -> NEW``.

    Args:
        record: The content of the new ``config.yaml``.
        saved: That of the run that is resumed, or options of its checkpoint.
    """
    if PROVENANCE not in saved:  # an older run recorded options as they were given
        record = record | record[PROVENANCE]["as_given"]
    ignored = {*ONE_OFF, PROVENANCE}
    names = [name for name in record if name in saved and name not in ignored]
    pairs = {name: (_plain(saved[name]), _plain(record[name])) for name in names}
    return [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _plain(value: Any) -> Any:
    """Return a tuple as the list that YAML and JSON make of it."""
    return list(value) if isinstance(value, tuple) else value


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@rank_zero_only
def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and cleanliness of the git checkout that tracks a folder; None if there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # the package may be installed below another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    return None
