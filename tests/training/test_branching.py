"""--decay_from branches a stable run into its cool-down, exactly as if it had been planned so from the start."""

from pathlib import Path

import pytest
import torch

import train
from lightning_gpt.checksums import folder_digests
from lightning_gpt.training.branching import _length

RUN = ["--eval_interval=3", "--eval_batches=1", "--sample_tokens=0", "--learning_rate=0.01", "--warmup_steps=2"]


def _files(folder: Path) -> dict[str, str]:
    return folder_digests(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])


def _assert_same(a: Path, b: Path) -> None:
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (a, b))
    for key in ("global_step", "lr_schedulers", "TokenData"):
        assert ours[key] == theirs[key], key
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    state = [content["optimizer_states"][0]["state"] for content in (ours, theirs)]
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(*state, rtol=0, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, tiny_flags):
    """Train a stable run that cools down from step 10 of 20, and one that was planned to cool down from 6 of 12."""
    folder = tmp_path_factory.mktemp("branching")
    flags = [*tiny_flags, *RUN, f"--data={text_file}", "--schedule=wsd", "--decay_fraction=0.5"]
    train.main([*flags, "--max_steps=20", "--keep=9", f"--out_dir={folder / 'stable'}"])
    train.main([*flags, "--max_steps=12", f"--out_dir={folder / 'planned'}"])
    return folder


def test_branch_equals_a_run_that_was_planned_so(runs, tmp_path, capsys):
    stable, branch = runs / "stable", tmp_path / "branch"
    before = _files(stable)
    command = [f"--decay_from={stable / 'checkpoints' / 'step-000006.ckpt'}", f"--out_dir={branch}", "--resume=auto"]
    train.main(command)
    out = capsys.readouterr().out
    assert "branching from" in out and "wsd: 0.01 until step 6, then down to 0.001 at step 12" in out
    _assert_same(branch, runs / "planned")
    assert _files(stable) == before
    # Its settings are its own: it goes on without the first run.
    train.main([f"--resume={branch / 'checkpoints' / 'step-000009.ckpt'}"])
    _assert_same(branch, runs / "planned")
    capsys.readouterr()
    train.main(command)
    assert capsys.readouterr().out.startswith("finished")


@pytest.mark.parametrize(("step", "fraction"), [(0, 0.5), (1, 0.1), (6, 0.5), (7, 0.3), (800, 0.2), (12345, 0.01)])
def test_branch_without_a_budget_begins_to_cool_down_at_once(step, fraction):
    planned = {steps: (steps - round(fraction * steps), round(fraction * steps)) for steps in range(2 * step + 20)}
    assert _length(step, fraction=fraction) == min(n for n, (begin, down) in planned.items() if down and begin >= step)


def test_branches_that_cannot_be_are_refused(runs, tiny_run, refused, tmp_path):
    stable = runs / "stable"
    early, out_dir = f"--decay_from={stable / 'checkpoints' / 'step-000006.ckpt'}", f"--out_dir={tmp_path / 'new'}"
    for flags, message in (
        ([f"--decay_from={tiny_run}", out_dir], "it was trained with --schedule cosine; give a run of --schedule wsd"),
        ([f"--decay_from={stable}", out_dir], "step 20 is in the cool-down, which began at step 10"),
        ([early, out_dir, "--max_steps=8"], "begins at step 4, and the checkpoint is at step 6"),
        ([early, out_dir, "--decay_fraction=1"], "--decay_fraction 1 leaves no stable or no decaying part"),
        ([early, out_dir, "--schedule=linear"], "--schedule linear: --decay_from"),
        ([early, f"--out_dir={stable}"], "is the run to branch from, which must not change"),
        ([early, f"--out_dir={stable}", "--overwrite"], "is the run to branch from, which must not change"),
        ([early, out_dir, f"--init_from={stable}"], "give one of them"),
        ([early, out_dir, f"--resume={stable}"], "give one of them"),
    ):
        refused(train.main, *flags, mentions=message)
    assert not (tmp_path / "new").exists()
