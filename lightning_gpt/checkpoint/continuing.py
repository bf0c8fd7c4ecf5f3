"""Find what a run can continue from: the newest run, and the newest checkpoint of a run folder."""

import sys
from collections.abc import Collection
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_gpt.checkpoint import RUNS, open_checkpoint, saved_at
from lightning_gpt.checksums import verify_checksums
from lightning_gpt.config import UserError


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first."""
    folder = run_dir / "checkpoints"
    # NAME.ckpt.old is complete if the machine died between the two renames that replace a folder.
    last = [path for path in (folder / "last.ckpt", folder / "last.ckpt.old") if path.exists()]
    others = {*folder.glob("*.ckpt"), *folder.glob("*.ckpt.old")} - set(last)
    return [*last, *sorted(others, key=saved_at, reverse=True)]


def newest_checkpoint(
    run_dir: Path, *, trust: bool = False, typed: Collection[str] = (), since: float = 0.0
) -> Path | None:
    """Return the newest checkpoint of a run folder whose checksums match; skip others, with a note on stderr.

    Args:
        run_dir: The run folder, which need not exist.
        trust: As for ``open_checkpoint``.
        typed: As for ``open_checkpoint``.
        since: Skip checkpoints that were saved before this time, in seconds since the epoch.

    Returns:
        The checkpoint, or None if there is none.
    """
    for path in checkpoints_in(run_dir):
        if saved_at(path) < since:
            continue
        try:
            verify_checksums(path)
            open_checkpoint(path, trust=trust, typed=typed)
        except UserError as error:
            rank_zero_only(print)(f"skipped: {error}", file=sys.stderr)
        else:
            return path.resolve()
    return None


def newest_run() -> Path:
    """Return the folder in ``runs/`` that was started or saved into last.

    Raises:
        UserError: There is none, or it has no checkpoint.
    """
    runs = {path.parent: path.stat().st_mtime for path in RUNS.glob("*/config.yaml")}
    for path in RUNS.glob("*/checkpoints/*.ckpt"):
        runs[path.parent.parent] = max(saved_at(path), runs.get(path.parent.parent, 0.0))
    if not runs:
        raise UserError(f"no run with a checkpoint in {RUNS}/ yet; train one first, or give a path")
    newest = max(runs, key=lambda run: runs[run])
    if not checkpoints_in(newest):
        raise UserError(f"--resume: the newest run, {newest}, has no checkpoint; give the folder of another run")
    return newest
