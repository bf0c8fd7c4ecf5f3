"""Which checkpoints are written when, and what happens when the disk refuses them.

Run as a script, this file is one process of a run: ``test_saving.py disk FOLDER`` fills the disk that it mounts at
FOLDER, ``test_saving.py rank FOLDER STRATEGY...`` is one rank, and one rank's writes fail.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning import Callback

import lightning_gpt
import train
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.cli import reporting_errors
from lightning_gpt.training.saving import save_last

REPO = Path(__file__).parents[2]
STEPS = 12


class At(Callback):
    """Call functions before training steps."""

    def __init__(self, actions):
        self.actions = actions

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step in self.actions:
            self.actions[trainer.global_step](trainer)


def run_with(callback, flags):
    """Train as train.py does, with a callback; return the exit code."""
    main = reporting_errors(lambda argv: lightning_gpt.train(lightning_gpt.parse_train(argv), callbacks=[callback]))
    try:
        main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def limit_files(size=resource.RLIM_INFINITY):
    """Let no file of this process grow beyond a number of bytes, as a quota would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    yield
    limit_files()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def step_of(run, name="last"):
    return open_checkpoint(run / "checkpoints" / f"{name}.ckpt").step


def inode(run, name):
    return (run / "checkpoints" / f"{name}.ckpt").stat().st_ino


@pytest.fixture(scope="session")
def whole(tmp_path_factory, text_file, tiny_flags):
    """Train 12 steps, validated at 5, 10 and 12, saved at 4 and 8 as well; read-only."""
    run = tmp_path_factory.mktemp("saving") / "whole"
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", f"--max_steps={STEPS}", "--eval_interval=5"]
    train.main([*flags, "--accumulate_grad_batches=2", "--save_interval=4", "--keep=3"])
    return run


def test_keep_leaves_the_newest_saves(whole):
    steps = ["step-000008.ckpt", "step-000010.ckpt", "step-000012.ckpt"]
    assert names(whole) == ["best.ckpt", "last.ckpt", *steps]
    assert [step_of(whole, name[:-5]) for name in steps] == [8, 10, 12]
    assert inode(whole, "last") == inode(whole, "step-000012")


def test_best_and_last_of_one_step_are_one_file(tiny_run):
    assert names(tiny_run) == ["best.ckpt", "last.ckpt"]
    assert step_of(tiny_run) == step_of(tiny_run, "best") == 4
    assert inode(tiny_run, "last") == inode(tiny_run, "best")


def test_resume_from_a_save_between_validations_is_bit_identical(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "parts")
    for name in ("best", "last", "step-000010", "step-000012"):
        (run / "checkpoints" / f"{name}.ckpt").unlink()
    train.main([f"--resume={run}/checkpoints/step-000008.ckpt"])
    assert names(run) == names(whole)
    for name in ("best", "last", "step-000010"):
        ours, theirs = (torch.load(folder / "checkpoints" / f"{name}.ckpt") for folder in (run, whole))
        for key in ("global_step", "lr_schedulers", "TokenData", "callbacks"):
            assert ours[key] == theirs[key], (name, key)
        ours, theirs = ((c["state_dict"], c["optimizer_states"][0]["state"]) for c in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_saves_after_the_resumed_step_stay_until_they_are_reached(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "again")
    train.main([f"--resume={run}/checkpoints/step-000008.ckpt", "--max_steps=9", "--keep=1", "--save_interval=1"])
    assert names(run) == [
        *("best.ckpt", "last.ckpt", "step-000009.ckpt"),
        *("step-000010.ckpt", "step-000012.ckpt"),  # of the earlier continuation
    ]


def test_save_last_writes_a_step_once(tmp_path, text_file, tiny_flags):
    run, seen = tmp_path / "run", []

    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (3, 4):  # 4 is validated afterwards, and the best
                for _ in range(2):
                    path = save_last(trainer)
                    seen.append((path, path.stat().st_ino, open_checkpoint(path).step))

    assert run_with(Saves(), [*tiny_flags, f"--data={text_file}", f"--out_dir={run}"]) == 0
    last = run / "checkpoints" / "last.ckpt"
    assert [(path, step) for path, _, step in seen] == [(last, 3)] * 2 + [(last, 4)] * 2
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[1] != seen[2]
    # The last validation lowered the best loss, which last must know.
    assert open_checkpoint(last).best_loss == open_checkpoint(run / "checkpoints" / "best.ckpt").best_loss
    assert inode(run, "last") == inode(run, "best")


@pytest.mark.parametrize("saved_by", ["this version", "an earlier version"])
def test_resumed_run_does_not_replace_a_better_best(tiny_run, tmp_path, saved_by):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if saved_by == "an earlier version":
        content = torch.load(last)
        [ours] = [state for key, state in content["callbacks"].items() if key.startswith("Checkpoints")]
        rest = "'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"
        content["callbacks"] = {
            f"ModelCheckpoint{{'monitor': 'val_loss', {rest}": {
                "best_model_score": torch.tensor(ours["best_model_score"])
            },
            f"ModelCheckpoint{{'monitor': None, {rest}": {"best_model_score": None},
        }
        torch.save(content, last)
        shutil.copy(last, best)
    before = best.read_bytes(), open_checkpoint(best).best_loss
    train.main([f"--resume={run}", "--max_steps=8", "--learning_rate=9", "--gradient_clip_val=0", "--warmup_steps=0"])
    assert step_of(run) == 8 and open_checkpoint(last).best_loss == before[1]
    assert best.read_bytes() == before[0]


ADVICE = "to continue from an earlier step: python train.py --resume"


def test_stop_ends_with_one_line_and_the_earlier_checkpoints(tmp_path, text_file, tiny_flags, capsys, unlimited):
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", "--max_steps=40", "--keep=9"]
    assert run_with(At({3: lambda _: limit_files(20_000)}), flags) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(rf"error: saving step 4 failed: \S+: File too large; {ADVICE} {run}", line), line
    assert names(run) == ["best.ckpt", "last.ckpt", "step-000002.ckpt"]
    limit_files()
    train.main([f"--resume={run}", "--max_steps=4"])
    assert step_of(run) == step_of(run, "best") == 4


def test_continue_warns_and_tries_again_at_the_next_save(tmp_path, text_file, tiny_flags, capsys, unlimited):
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", "--max_steps=7", "--save_interval=3"]
    actions = {1: lambda _: limit_files(20_000), 5: lambda _: limit_files()}
    assert run_with(At(actions), [*flags, "--on_save_error=continue"]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    expected = [rf"warning: saving step {step} failed: .*: File too large; training goes on, .*" for step in (2, 3, 4)]
    assert len(lines) == 3 and all(map(re.fullmatch, expected, lines)), lines
    assert names(run) == ["best.ckpt", "last.ckpt"] and step_of(run) == 7


def test_continue_fails_if_the_final_save_does(tmp_path, text_file, tiny_flags, capsys, unlimited):
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", "--on_save_error=continue"]
    assert run_with(At({3: lambda _: limit_files(20_000)}), flags) == 2
    warning, error = capsys.readouterr().err.strip().splitlines()
    assert warning.startswith("warning: saving step 4 failed: ")
    assert re.fullmatch(rf"error: saving step 4 failed: \S+: File too large; {ADVICE} {run}", error), error
    assert names(run) == ["best.ckpt", "last.ckpt"] and step_of(run) == 2


@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_removed_run_folder_ends_the_run_with_one_line(tmp_path, text_file, tiny_flags, capsys, logger):
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={run}", f"--logger={logger}", "--log_every_n_steps=1"]
    assert run_with(At({2: lambda _: shutil.rmtree(run)}), flags) == 2
    warning, error = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(rf"warning: the log cannot be written: {run}.*; training goes on without it", warning), warning
    folder = run / "checkpoints"
    why = f"{folder}: the folder no longer exists; no earlier checkpoint is left"
    assert error == f"error: saving step 4 failed: {why}" and not run.exists()


def test_unwritable_config_is_refused(tmp_path, text_file, tiny_flags, refused, unlimited):
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}"]
    limit_files(100)
    refused(train.main, *flags, mentions=(f"--out_dir {tmp_path / 'run'} cannot be written", "File too large"))


def test_unknown_reaction_to_errors_is_refused(text_file, tiny_flags, refused):
    flags = [*tiny_flags, f"--data={text_file}", "--on_save_error=ignore"]
    refused(train.main, *flags, mentions="--on_save_error ignore is unknown; choose one of stop, continue")


# A real disk: a file system in memory of 600 kB, mounted in a namespace of the process.


def fill(folder, trainer):
    """Leave no byte on a disk, and log more than fits into the last page of the log."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass
    trainer.logger.log_metrics({str(number): 0.0 for number in range(200)}, step=trainer.global_step)
    trainer.logger.save()


def make_read_only(folder):
    """Put a read-only view of a file system in its place; the run's open lock keeps it from being remounted itself."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def disk(folder, flags):
    """Train on a full disk, on one that becomes full or read-only; record the exit codes, and what is left."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], check=True)
    logged = [*flags, "--logger=tensorboard", "--log_every_n_steps=1", "--max_steps=8"]
    scenarios = {
        "freed": (["--on_save_error=continue"], {3: partial(fill, folder), 5: lambda _: (folder / "filler").unlink()}),
        "full": ([], {3: partial(fill, folder)}),
        "full at start": ([], {}),
        "read-only": ([], {3: lambda _: make_read_only(folder)}),
        "read-only at start": ([], {}),
    }
    seen = {}
    for name, (extra, actions) in scenarios.items():
        print(f"--- {name}", file=sys.stderr, flush=True)
        run = folder / name.replace(" ", "-")
        code = run_with(At(actions), [*logged, *extra, f"--out_dir={run}"])
        left = names(run) if (run / "checkpoints").exists() else []
        seen[name] = code, left, step_of(run) if left else None
        if name == "full at start":
            (folder / "filler").unlink()
    print(f"\n{json.dumps(seen)}")


@pytest.fixture(scope="module")
def disk_results(tmp_path_factory, text_file, tiny_flags):
    """Return exit code, files and last step of each scenario of `disk`, and its lines on stderr."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare -rm, to mount a file system in memory")
    folder = tmp_path_factory.mktemp("disk")
    command = ["unshare", "-rm", sys.executable, __file__, "disk", str(folder), *tiny_flags, f"--data={text_file}"]
    done = subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *parts = done.stderr.split("--- ")
    lines = {part.splitlines()[0]: part.splitlines()[1:] for part in parts}
    return {name: (*seen, lines[name]) for name, seen in json.loads(done.stdout.splitlines()[-1]).items()}


FULL = "No space left on device"


def test_disk_that_is_full_for_a_while_costs_only_warnings(disk_results):
    code, left, step, lines = disk_results["freed"]
    assert (code, left, step) == (0, ["best.ckpt", "last.ckpt"], 8)
    assert [line.split(":")[:2] for line in lines] == [
        ["warning", " the log cannot be written"],
        ["warning", " saving step 4 failed"],
    ]
    assert all(FULL in line for line in lines), lines


@pytest.mark.parametrize(("scenario", "reason"), [("full", FULL), ("read-only", "Read-only file system")])
def test_unwritable_disk_stops_the_run(disk_results, scenario, reason):
    code, left, step, [warning, error] = disk_results[scenario]
    assert (code, left, step) == (2, ["best.ckpt", "last.ckpt"], 2)
    assert warning.startswith("warning: the log cannot be written: ") and reason in warning
    assert error.startswith("error: saving step 4 failed: ") and reason in error


@pytest.mark.parametrize("scenario", ["full at start", "read-only at start"])
def test_unwritable_disk_is_refused_at_start(disk_results, scenario):
    code, _, step, [error] = disk_results[scenario]
    assert (code, step) == (2, None)
    assert error.startswith("error: --out_dir ") and "cannot be written" in error


# One of two ranks cannot write.


def rank(folder, strategies, flags):
    """Train on two ranks, one of which cannot write at the second save; record the exit codes of this rank.

    Then train with a save between validations, and resume from it.
    """
    seen = {}
    for strategy in strategies:
        whole, parts = folder / strategy / "whole", folder / strategy / "parts"
        between = [f"--strategy={strategy}", "--save_interval=3", "--keep=9", "--eval_interval=5"]
        assert run_with(At({}), [*flags, *between, f"--out_dir={whole}"]) == 0
        assert run_with(At({}), [f"--resume={whole}/checkpoints/step-000003.ckpt", f"--out_dir={parts}"]) == 0
        fails = os.environ["RANK"] == ("0" if strategy == "ddp" else "1")  # under ddp, rank 0 alone writes
        actions = {3: lambda _: limit_files(1000), 5: lambda _: limit_files()} if fails else {}
        for reaction in ("continue", "stop"):
            run = folder / strategy / reaction
            extra = [f"--strategy={strategy}", f"--on_save_error={reaction}", f"--out_dir={run}", "--keep=1"]
            seen[strategy, reaction] = run_with(At(actions), [*flags, *extra])
            limit_files()
    (folder / f"codes-{os.environ['RANK']}.json").write_text(json.dumps([(*key, code) for key, code in seen.items()]))


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    "strategies",
    [
        ["fsdp"],
        pytest.param(["ddp"], marks=pytest.mark.slow),
        pytest.param(["deepspeed_stage_2", "deepspeed_stage_3"], marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_two_ranks_save_alike(tmp_path, text_file, tiny_flags, strategies):
    """If one rank cannot write, all stop or warn; a save between validations resumes bit-identically."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "rank"]
    command += [str(tmp_path), ",".join(strategies), *tiny_flags, f"--data={text_file}"]
    command += ["--sample_tokens=0", "--max_steps=6"]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    for number in range(2):
        codes = json.loads((tmp_path / f"codes-{number}.json").read_text())
        assert codes == [[s, reaction, code] for s in strategies for reaction, code in (("continue", 0), ("stop", 2))]
    lines = [line for line in done.stderr.splitlines() if line.startswith(("warning: ", "error: "))]
    kinds = ["warning: saving step 4 failed: ", "error: saving step 4 failed: "] * len(strategies)
    assert len(lines) == len(kinds) and all(map(str.startswith, lines, kinds)), done.stderr
    assert "Traceback" not in done.stderr
    for strategy in strategies:
        for reaction, step in (("continue", 6), ("stop", 2)):
            run = tmp_path / strategy / reaction
            assert names(run) == ["best.ckpt", "last.ckpt", f"step-{step:06d}.ckpt"]
            assert step_of(run) == step_of(run, "best") == step
            first, *others = (run / "checkpoints" / name for name in names(run))
            files = [path.relative_to(first) for path in (first, *first.rglob("*")) if path.is_file()]
            assert files and all(os.path.samefile(first / file, other / file) for file in files for other in others)
        runs = [tmp_path / strategy / name / "checkpoints" for name in ("whole", "parts")]
        assert [sorted(path.name for path in run.glob("step-*")) for run in runs] == [
            ["step-000003.ckpt", "step-000005.ckpt", "step-000006.ckpt"],
            ["step-000005.ckpt", "step-000006.ckpt"],
        ]
        ours, theirs = (open_checkpoint(run / "last.ckpt") for run in runs)
        assert ours.hash() == theirs.hash() and ours.best_loss == theirs.best_loss
        for name in ours.names():
            torch.testing.assert_close(ours.optimizer_state(name), theirs.optimizer_state(name), rtol=0, atol=0)


if __name__ == "__main__":
    mode, where, *rest = sys.argv[1:]
    if mode == "disk":
        disk(Path(where), rest)
    else:
        rank(Path(where), rest[0].split(","), rest[1:])
