"""Runs on two ranks of which one stops, fails, dies, or hangs.

Run as a script, this file is one rank: ``test_dead_ranks.py RANK EVENT FLAGS`` trains, with an event on one rank.
"""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning import Callback

import lightning_gpt
from lightning_gpt.training import watchdog

REPO = Path(__file__).parents[2]
STEPS, AT = 40, 16
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Event(Callback):
    """Do something once, on one rank, at the beginning of a step."""

    def __init__(self, rank, event):
        self.rank, self.event = int(rank), event

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 0:
            os.write(2, f"\npid {os.getpid()}\n".encode())  # in one piece, unlike print
        if trainer.global_step != AT or trainer.global_rank != self.rank:
            return
        if self.event == "raise":
            raise ValueError("something is wrong\nhere")
        os.kill(os.getpid(), getattr(signal, self.event))


@pytest.fixture(scope="module")
def flags(text_file, tiny_flags):
    flags = [*tiny_flags, f"--data={text_file}", f"--max_steps={STEPS}", "--eval_interval=10", "--eval_batches=4"]
    return [*flags, "--trainer.enable_progress_bar=false"]


def start(run, flags, *, rank, event, launcher=()):
    """Start two ranks, and return the process."""
    command = [sys.executable, *launcher, __file__, str(rank), event, *flags, f"--out_dir={run}"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=run.parent, env=environment, **pipes)


def assert_no_process_is_left(printed):
    """Check the ranks, which print their process ids; they may take a moment to follow their parent."""
    pids = [int(pid) for pid in re.findall(r"^pid (\d+)$", printed, re.MULTILINE)]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and is_alive(pid)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.2)


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize(
    ("strategy", "rank", "event", "launcher", "message"),
    [
        ("ddp", 1, "SIGKILL", [], "rank 1 was killed by SIGKILL"),
        pytest.param("fsdp", 0, "SIGKILL", [], "rank 0 is gone", marks=pytest.mark.slow),
        pytest.param(
            *("deepspeed_stage_2", 1, "raise", [], "rank 1 failed with ValueError: something is wrong"),
            marks=[pytest.mark.slow, needs_deepspeed],
        ),
        pytest.param("ddp", 1, "SIGKILL", TORCHRUN, "rank 1 is gone", marks=pytest.mark.slow),
    ],
    ids=["killed", "parent-killed", "exception", "torchrun"],
)
def test_run_ends_with_one_message_when_a_rank_dies(tmp_path, flags, strategy, rank, event, launcher, message):
    run = tmp_path / "run"
    devices = [f"--strategy={strategy}", *([] if launcher else ["--devices=2"])]
    process = start(run, [*flags, *devices], rank=rank, event=event, launcher=launcher)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == (-signal.SIGKILL if rank == 0 else 1), printed
    errors = re.findall(r"^error: .*$", printed, re.MULTILINE)
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}"), printed
    assert errors[0].endswith(f"; the run ends; to continue: python train.py --resume {run}"), printed
    assert ("Traceback" in printed) == (event == "raise" or bool(launcher)), "only what the user's code raised"
    assert_no_process_is_left(printed)


@pytest.mark.slow
def test_stalled_run_says_who_waits_and_obeys_a_signal(tmp_path, flags):
    run = tmp_path / "run"
    process = start(run, [*flags, "--strategy=ddp", "--devices=2"], rank=1, event="SIGSTOP")
    assert process.stdout
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("no progress for "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 143
    place = rf"rank 0 is in step {AT + 1} \(\w+\); rank 1 did not answer; to continue: python train.py --resume {run}"
    assert re.search(rf"^no progress for \d+ s: {place}$", printed, re.MULTILINE), printed
    assert re.search(rf"^SIGTERM, but no step has ended for \d+ s: {place}$", printed, re.MULTILINE), printed
    assert_no_process_is_left(printed)


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path, flags):
    """Train three times in one launch: uninterrupted, stopped by a signal to rank 1, and resumed.

    fsdp gathers parameters in each step and saves on all ranks, so it hangs if the ranks stop at different steps.
    """
    process = start(tmp_path / "run", [*flags, "--strategy=fsdp"], rank=1, event="SIGTERM", launcher=TORCHRUN)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    whole, resumed = (lightning_gpt.load(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    stops = re.findall(rf"^stopped at step (\d+); to continue: python train.py --resume {tmp_path}/run$", printed, re.M)
    assert len(stops) == 1 and AT < int(stops[0]) < STEPS, printed


@pytest.mark.slow
def test_torchrun_restarts_continue_by_themselves(tmp_path, flags):
    """Train uninterrupted; then with a rank that is killed, after which torchrun starts both ranks again."""
    launcher = [*TORCHRUN[:-1], "--max_restarts=1", TORCHRUN[-1]]
    process = start(tmp_path / "run", [*flags, "--strategy=ddp"], rank=1, event="restart", launcher=launcher)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert f"error: rank 1 is gone (killed?); the run ends; to continue: python train.py --resume {tmp_path}" in printed
    whole, run = (lightning_gpt.load(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert whole.keys() == run.keys() and all(torch.equal(tensor, run[name]) for name, tensor in whole.items())
    assert len(re.findall("^step 10: ", printed, re.MULTILINE)) == 2, "one for each run: the second goes on from there"


def two_runs(argv, rank):
    """Train uninterrupted; then with a rank that is killed, in torchrun's first attempt only."""
    first, run = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", argv[-1].partition("=")[2]
    if first:
        lightning_gpt.train(lightning_gpt.parse_train([*argv[:-1], f"--out_dir={Path(run).parent / 'whole'}"]))
    lightning_gpt.train(lightning_gpt.parse_train(argv), callbacks=[Event(rank, "SIGKILL")] if first else [])


def three_runs(argv, event):
    """Train uninterrupted; then with the event; then from where that stopped."""
    run = argv[-1].partition("=")[2]
    lightning_gpt.train(lightning_gpt.parse_train([*argv[:-1], f"--out_dir={Path(run).parent / 'whole'}"]))
    try:
        lightning_gpt.train(lightning_gpt.parse_train(argv), callbacks=[event])
    except SystemExit as stop:
        assert stop.code == 143
    else:
        raise AssertionError("the signal did not stop the run")
    lightning_gpt.train(lightning_gpt.parse_train([*argv, f"--resume={run}"]))


if __name__ == "__main__":
    _, rank, event, *argv = sys.argv
    if event == "SIGTERM":
        three_runs(argv, Event(rank, event))
    elif event == "restart":
        two_runs(argv, rank)
    else:
        # Shorter than in use, but longer than a busy machine keeps a rank waiting.
        watchdog.GRACE, watchdog.STALLED, watchdog.FIRST_STALLED = 10.0, 12.0, 120.0
        lightning_gpt.train(lightning_gpt.parse_train(argv), callbacks=[Event(rank, event)])
