"""Find where a training run starts: anew, or at a checkpoint with the settings that were saved beside it."""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from lightning_gpt.cli.nanogpt_flags import resumed_settings
from lightning_gpt.cli.parser import load_yaml
from lightning_gpt.config import EXCLUSIVE, PROVENANCE, Resumed, UserError
from lightning_gpt.data.tasks import is_own_task
from lightning_gpt.launch import launches
from lightning_gpt.trust import is_own, require_honoured, split_name

# Options whose value may be code, each with a function that says so. DeepSpeed imports the classes that its file names.
CAN_NAME_CODE: dict[str, Callable[[str], object]] = {
    "implementation": split_name,
    "data": is_own_task,
    "deepspeed_config": bool,
}
AUTO, LATEST = "auto", "latest"
STARTS_ANEW = ("init_from", "pretrained_embeddings")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: The checkpoint to resume; None for a new run.
        settings: Options that are the defaults of the command line.
        resumed: How the run came to be resumed; None for a new run.
        branches: Whether the run is a branch of the checkpoint's (``--decay_from``).
    """

    checkpoint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    resumed: Resumed | None = None
    branches: bool = False


def find_start(
    known: argparse.Namespace, from_files: dict[str, Any], *, command: str, trust: bool, typed: Mapping[str, Any]
) -> Start:
    """Decide whether a run is new or resumed, and from which checkpoint.

    When torchrun or SLURM has restarted this command, the run goes on in the folder that it opened the first time.

    Args:
        known: The flags that ``scout`` reads.
        from_files: The options of ``--config`` files.
        command: The command line.
        trust: Whether the checkpoint, and the settings beside it, may name code.
        typed: The values of ``--implementation`` and ``--data`` in this command, which may name code anyway.

    Raises:
        UserError: The checkpoint does not exist, names code that it may not, or the flags contradict each other.
    """
    resume, out_dir = known.resume or from_files.get("resume"), known.out_dir or from_files.get("out_dir")
    decay_from = known.decay_from or from_files.get("decay_from")
    restarted = {name for name, count in launches().items() if count}
    begin = partial(_begin, decay_from and str(decay_from), out_dir=out_dir, trust=trust, typed=typed)
    if decay_from:
        for name in STARTS_ANEW:
            if getattr(known, name) or from_files.get(name):
                raise UserError(f"--{name} starts with other weights than --decay_from; give one of them")
    if not resume and not restarted:
        return begin()
    if resume and str(known.overwrite or from_files.get("overwrite")).lower() == "true":
        raise UserError("--overwrite replaces a run and --resume continues one; give one of them")
    from lightning_gpt.checkpoint import RUNS, find_checkpoint  # imports torch, which --help must not
    from lightning_gpt.checkpoint.continuing import newest_checkpoint, newest_run

    find_newest = partial(newest_checkpoint, trust=trust, typed=[str(typed["implementation"])])
    resume_at = partial(_resume, trust=trust, typed=typed)
    if resume == AUTO and not out_dir:
        raise UserError("--resume auto looks in --out_dir; give one, or --resume alone for the newest run")
    if resume and resume != AUTO:
        for name in (*STARTS_ANEW, "decay_from"):
            if getattr(known, name):
                raise UserError(f"--{name} starts a new run and --resume continues one; give one of them")
        if resume != LATEST:
            checkpoint = find_checkpoint(str(resume), which="last")
            folder = Path(out_dir or checkpoint.parent.parent)
            opened = _opened_by(restarted, [folder])
            later = find_newest(folder, since=opened[folder]) if opened else None
            return resume_at(later or checkpoint, automatic=later is not None)
    folders = [Path(out_dir)] if out_dir else list(RUNS.glob("*/"))
    # Without --out_dir, a job may train several runs: the command tells them apart.
    opened = _opened_by(restarted, folders, command=None if out_dir else command)
    run_dir = max(opened, key=lambda folder: opened[folder]) if opened else Path(out_dir) if out_dir else None
    if resume == LATEST and not opened:
        return resume_at(find_checkpoint(str(run_dir or newest_run()), which="last"), automatic=False)
    if run_dir and (opened or resume == AUTO):
        newest = find_newest(run_dir)
        return resume_at(newest, automatic=True) if newest else begin(settings={"out_dir": str(run_dir)})
    return begin()


def _begin(
    decay_from: str | None,
    *,
    out_dir: str | None,
    trust: bool,
    typed: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> Start:
    """Return the start of a new run, or of a branch of the run that ``--decay_from`` names.

    A branch has the settings of that run, except its folder and what determines the length of run and schedule.

    Raises:
        UserError: As for ``_resume``, or the branch would be written into the folder of that run.
    """
    settings = dict(settings or {})
    if not decay_from:
        return Start(settings=settings)
    from lightning_gpt.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(decay_from, which="last")
    folder = settings.get("out_dir") or out_dir
    if folder and checkpoint.is_relative_to(Path(folder).resolve()):
        raise UserError(f"--out_dir {folder} is the run to branch from, which must not change; choose another folder")
    start = _resume(checkpoint, automatic=False, trust=trust, typed=typed)
    assert start.resumed is not None
    dropped = {"out_dir", "lr_decay_steps", "decay_from", *EXCLUSIVE[0]}
    own = {name: value for name, value in start.settings.items() if name not in dropped}
    saved = start.resumed.saved
    made = saved.get(PROVENANCE)
    if isinstance(made, dict):  # a restart would take sessions of the other run for its own
        saved = saved | {PROVENANCE: made | {"sessions": []}}
    return replace(start, settings=own | settings, resumed=Resumed(automatic=False, saved=saved), branches=True)


def _resume(checkpoint: Path, *, automatic: bool, trust: bool, typed: Mapping[str, Any]) -> Start:
    """Return the start from a checkpoint, with the run's options as they were given, and the checkpoint's model.

    Every rank verifies the whole checkpoint, and so all stop alike: there is no process group yet, and bytes must be
    verified before they are read.

    Raises:
        UserError: The checkpoint is damaged or cannot be opened, or the saved options name code that is neither typed
            nor trusted.
    """
    from lightning_gpt.checkpoint import open_checkpoint
    from lightning_gpt.checksums import verify_checksums
    from lightning_gpt.implementations.registry import get_implementation

    config = checkpoint.parent.parent / "config.yaml"
    saved = load_yaml(str(config)) if config.exists() else {}
    provenance = saved.get(PROVENANCE)
    given = provenance.get("as_given") if isinstance(provenance, dict) else None
    settings = saved | (given if isinstance(given, dict) else {})
    for name in ("trust_checkpoint", "config"):  # what the file itself may not decide
        settings.pop(name, None)
    for name, names_code in CAN_NAME_CODE.items():
        if not typed[name] and settings.get(name) is not None and names_code(str(settings[name])):
            require_honoured(str(settings[name]), flag=name, source=config, trust=trust or is_own(config), typed=())
    if not automatic:  # newest_checkpoint has verified it
        verify_checksums(checkpoint)
    opened = open_checkpoint(checkpoint, trust=trust, typed=[str(typed["implementation"])])
    model = {option.name for option in get_implementation(opened.implementation).config_options()}
    fields = {"implementation": opened.implementation} | {k: v for k, v in opened.model_config.items() if k in model}
    if opened.settings:
        data = {"data": str(opened.dataset)} if opened.dataset else {}
        if not data and not typed["data"]:
            dataset = opened.settings.get("dataset", "unknown")
            raise UserError(f"{checkpoint}: its training data (dataset {dataset}) is not found; give --data")
        return Start(str(checkpoint), resumed_settings(opened.settings) | fields | data, Resumed(automatic, {}))
    settings |= fields
    if saved:
        settings["out_dir"] = str(config.parent)
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
