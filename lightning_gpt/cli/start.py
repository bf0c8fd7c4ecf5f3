"""Find where a training run starts: anew, or at a checkpoint with the settings that were saved beside it."""

import argparse
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_gpt.cli.parser import load_yaml
from lightning_gpt.config import PROVENANCE, Resumed, UserError
from lightning_gpt.launch import launches

AUTO, LATEST = "auto", "latest"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: The checkpoint to resume; None for a new run.
        settings: Options that are the defaults of the command line.
        resumed: How the run came to be resumed; None for a new run.
    """

    checkpoint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    resumed: Resumed | None = None


def find_start(known: argparse.Namespace, from_files: dict[str, Any], *, command: str) -> Start:
    """Decide whether a run is new or resumed, and from which checkpoint.

    When torchrun or SLURM has restarted this command, the run goes on in the folder that it opened the first time.

    Args:
        known: The flags that ``scout`` reads.
        from_files: The options of ``--config`` files.
        command: The command line.

    Raises:
        UserError: The checkpoint does not exist, or the flags contradict each other.
    """
    resume, out_dir = known.resume or from_files.get("resume"), known.out_dir or from_files.get("out_dir")
    restarted = {name for name, count in launches().items() if count}
    if not resume and not restarted:
        return Start()
    from lightning_gpt.checkpoint import RUNS, find_checkpoint  # imports torch, which --help must not
    from lightning_gpt.checkpoint.continuing import newest_checkpoint, newest_run

    trust = str(known.trust_checkpoint or from_files.get("trust_checkpoint")).lower() == "true"
    if resume == AUTO and not out_dir:
        raise UserError("--resume auto looks in --out_dir; give one, or --resume alone for the newest run")
    if resume and resume != AUTO:
        for name in ("init_from", "pretrained_embeddings"):
            if getattr(known, name):
                raise UserError(f"--{name} starts a new run and --resume continues one; give one of them")
        if resume != LATEST:
            checkpoint = find_checkpoint(str(resume), which="last")
            folder = Path(out_dir or checkpoint.parent.parent)
            opened = _opened_by(restarted, [folder])
            later = newest_checkpoint(folder, trust=trust, since=opened[folder]) if opened else None
            return _resume(later or checkpoint, automatic=later is not None)
    folders = [Path(out_dir)] if out_dir else list(RUNS.glob("*/"))
    # Without --out_dir, a job may train several runs: the command tells them apart.
    opened = _opened_by(restarted, folders, command=None if out_dir else command)
    run_dir = max(opened, key=lambda folder: opened[folder]) if opened else Path(out_dir) if out_dir else None
    if resume == LATEST and not opened:
        return _resume(find_checkpoint(str(run_dir or newest_run()), which="last"), automatic=False)
    if run_dir and (opened or resume == AUTO):
        newest = newest_checkpoint(run_dir, trust=trust)
        return _resume(newest, automatic=True) if newest else Start(settings={"out_dir": str(run_dir)})
    return Start()


def _resume(checkpoint: Path, *, automatic: bool) -> Start:
    config = checkpoint.parent.parent / "config.yaml"
    saved = load_yaml(str(config)) if config.exists() else {}
    settings = saved | {"out_dir": str(config.parent)} if saved else {}
    return Start(str(checkpoint), settings, Resumed(automatic, saved))


def _opened_by(names: set[str], folders: Iterable[Path], *, command: str | None = None) -> dict[Path, float]:
    """Return the run folders that one of the named launches opened, each with the time of the first opening.

    Args:
        names: Names of launches.
        folders: The folders to search.
        command: Only count openings by this command line.
    """
    found: dict[Path, float] = {}
    for folder in folders if names else ():
        with contextlib.suppress(UserError, LookupError, TypeError, ValueError):  # none, or edited by hand
            for session in load_yaml(str(folder / "config.yaml"))[PROVENANCE]["sessions"]:
                if names & set(session["launches"]) and command in (None, session["command"]):
                    found.setdefault(folder, datetime.fromisoformat(session["time"]).timestamp())
    return found
