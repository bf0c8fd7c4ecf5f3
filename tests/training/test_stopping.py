"""Runs that stop: on signals, after a time, without progress, and as SLURM jobs."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

import lightning_gpt
import train
from lightning_gpt.training.ranks import Agreement

REPO = Path(__file__).parents[2]
STEPS = 40
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGUSR2: 75}


class Send(Callback):
    """Call a hook's action once: by default, send a signal to this process and give its thread time to see it."""

    def __init__(self, hook, number, *, step=0):
        self.number, self.step, self.sent = number, step, False
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        if not self.sent and trainer.global_step >= self.step and not trainer.sanity_checking:
            self.sent = True
            os.kill(os.getpid(), self.number)
            time.sleep(1.0)


@pytest.fixture(scope="module")
def flags(text_file, tiny_flags):
    return [*tiny_flags, f"--data={text_file}", f"--max_steps={STEPS}", "--eval_interval=10", "--eval_batches=4"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, flags):
    """Return the last checkpoint of a run that nothing stops."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train.main([*flags, f"--out_dir={run}"])
    return saved(run)


@pytest.fixture
def stopped(tmp_path, flags, capsys):
    """Return a function that trains until a signal, and returns the run, the exit code, and what was printed."""

    def call(callback, *more):
        run = tmp_path / "run"
        config = lightning_gpt.parse_train([*flags, f"--out_dir={run}", *more])
        before = [signal.getsignal(number) for number in SIGNALS]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            lightning_gpt.train(config, callbacks=[callback])
        assert [signal.getsignal(number) for number in SIGNALS] == before
        return run, stop.value.code, "".join(capsys.readouterr())

    return call


def saved(run, which="last"):
    return torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)


def assert_same(one, two):
    assert one["global_step"] == two["global_step"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    moments = [content["optimizer_states"][0]["state"] for content in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    for key, state in moments[0].items():
        assert all(torch.equal(tensor, moments[1][key][name]) for name, tensor in state.items())


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(stopped, uninterrupted, number, flags):
    run, code, printed = stopped(Send("on_train_batch_start", number, step=12))
    assert code == SIGNALS[number]
    assert f"stopped at step 13; to continue: python train.py --resume {run}\n" in printed
    assert saved(run)["global_step"] == 13
    if number == signal.SIGTERM:
        train.main([*flags, f"--resume={run}"])
        assert_same(saved(run), uninterrupted)


def test_signal_in_the_middle_of_an_accumulation_waits_for_the_step(stopped):
    run, code, printed = stopped(Send("on_before_backward", signal.SIGTERM, step=5), "--grad_accum=3", "--max_steps=9")
    assert code == 143 and "stopped at step 6; " in printed and saved(run)["global_step"] == 6


def test_signal_during_validation_leaves_it_without_a_result(stopped, uninterrupted, flags, capsys):
    run, code, printed = stopped(Send("on_validation_batch_start", signal.SIGTERM, step=20))
    assert code == 143 and f"stopped at step 20; to continue: python train.py --resume {run}\n" in printed
    assert "step 10: " in printed and "step 20: " not in printed
    assert saved(run)["global_step"] == 20 and saved(run, "best")["global_step"] == 10
    train.main([*flags, f"--resume={run}"])
    assert_same(saved(run), uninterrupted)


def test_signal_during_a_save_lets_it_complete(stopped):
    run, code, printed = stopped(Send("on_save_checkpoint", signal.SIGTERM, step=10))
    assert code == 143 and "stopped at step 10; " in printed
    assert saved(run, "best")["global_step"] == saved(run)["global_step"] == 10


def test_signal_before_the_first_step_ends_at_once(stopped):
    run, code, printed = stopped(Send("on_fit_start", signal.SIGTERM))
    assert code == 143 and "\nstopped before the first step\n" in printed and "--resume" not in printed
    assert not list(run.glob("checkpoints/*"))


def test_signal_in_the_last_step_keeps_the_complete_run(stopped):
    run, code, printed = stopped(Send("on_validation_end", signal.SIGTERM, step=STEPS))
    assert code == 143 and "stopped after the last step; the run is complete\n" in printed
    assert "--- sample ---" not in printed and saved(run)["global_step"] == STEPS


def test_signal_during_the_final_sample_ends_at_once(stopped):
    run, code, printed = stopped(Send("on_train_end", signal.SIGINT))  # called after the sample
    assert code == 130 and "stopped after the last step; the run is complete\n" in printed
    assert saved(run)["global_step"] == STEPS


SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NAME": "gpt",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "MASTER_PORT": "29999",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Set the variables of a SLURM job; return the file in which a stub of scontrol records its arguments."""
    calls = tmp_path / "calls"
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ "$2" != 13 ] || {{ echo no such job >&2; exit 1; }}\n')
    stub.chmod(0o755)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return calls


@pytest.mark.parametrize(
    ("variables", "call", "says"),
    [
        ({}, "requeue 42\n", "requeued SLURM job 42\n"),
        ({"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 40_3\n", "requeued SLURM job 40_3\n"),
        ({"SLURM_JOB_ID": "13"}, "requeue 13\n", "scontrol requeue 13 failed: no such job\n"),
        ({"SLURM_JOB_NAME": "interactive"}, "", ""),
    ],
    ids=["job", "array", "refused", "interactive"],
)
def test_slurm_job_is_requeued_after_its_checkpoint_is_saved(stopped, slurm, monkeypatch, variables, call, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run, code, printed = stopped(Send("on_train_batch_start", signal.SIGUSR1, step=4))
    assert code == 75 and f"stopped at step 5; to continue: python train.py --resume {run}\n" in printed
    assert says in printed and (slurm.read_text() if slurm.exists() else "") == call
    assert saved(run)["global_step"] == 5
    assert not list(Path.cwd().iterdir()), "Lightning's own requeueing writes hpc_ckpt_1.ckpt"


@pytest.mark.parametrize("out_dir", [["--out_dir=run"], []], ids=["named", "unnamed"])
def test_requeued_slurm_job_goes_on_in_its_run_folder(slurm, flags, uninterrupted, monkeypatch, capsys, out_dir):
    argv = [*flags, *out_dir]
    with pytest.raises(SystemExit) as stop:
        send = Send("on_train_batch_start", signal.SIGUSR1, step=15)
        lightning_gpt.train(lightning_gpt.parse_train(argv), callbacks=[send])
    assert stop.value.code == 75 and slurm.read_text() == "requeue 42\n"
    (run,) = [Path("run")] if out_dir else Path("runs").glob("*/")
    assert saved(run)["global_step"] == 16
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train.main(argv)
    assert_same(saved(run), uninterrupted)
    assert len(list(Path.cwd().glob("runs/*/"))) == 1 - len(out_dir)


def test_slurm_termination_is_saved_and_not_requeued(stopped, slurm):
    """`scancel` sends SIGTERM as well, and the user who cancels a job does not want it back."""
    run, code, _ = stopped(Send("on_train_batch_start", signal.SIGTERM, step=4))
    assert code == 143 and not slurm.exists() and saved(run)["global_step"] == 5


def test_run_does_not_start_from_lightnings_requeue_checkpoint(slurm, flags, tmp_path, uninterrupted):
    Path("hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    train.main([*flags, f"--out_dir={tmp_path / 'run'}"])
    assert_same(saved(tmp_path / "run"), uninterrupted)


def test_max_time_saves_and_ends_normally(flags, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*flags, f"--out_dir={run}", "--max_steps=1000000", "--max_time=1s"])
    out = capsys.readouterr().out
    step = saved(run)["global_step"]
    assert f"stopped at step {step}; to continue: python train.py --resume {run}\n" in out
    assert 0 < step < 1000000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("12h", 43200), ("1.5h", 5400), ("2d", 172800), ("60", 60), ("12:00:00", 43200)]
    + [("1-12:00:00", 129600)],
)
def test_durations(text, seconds):
    from lightning_gpt.training.stopping import duration

    config = lightning_gpt.parse_train([f"--max_time={text}"])
    assert config.trainer.max_time is not None and duration(config.trainer.max_time) == seconds


@pytest.mark.parametrize("text", ["5x", "-5m", "0s", "h", "1-12"])
def test_wrong_duration_is_refused(refused, flags, text):
    refused(train.main, *flags, f"--max_time={text}", mentions=[f"--max_time {text} is not a duration", "30m"])


def test_patience_stops_after_validations_without_progress(flags, tmp_path, capsys):
    run = tmp_path / "run"
    still = ["--learning_rate=1e-30", "--warmup_steps=0", f"--out_dir={run}"]
    train.main([*flags, *still, "--patience=2"])
    out = capsys.readouterr().out
    assert "stopped at step 30: val_loss has not fallen for 2 validations; the best is " in out
    assert "--- sample ---" in out and out.endswith(f"next: python sample.py --checkpoint {run}\n")
    assert saved(run)["global_step"] == 30 and saved(run, "best")["global_step"] == 10


def test_patience_counts_on_in_a_resumed_run(flags, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*flags, "--learning_rate=1e-30", "--max_steps=20", f"--out_dir={run}", "--patience=5"])
    train.main([f"--resume={run}", "--max_steps=40", "--patience=2"])
    assert "stopped at step 30: val_loss has not fallen for 2 validations" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_ranks_agree_on_a_boundary_whenever_each_learns_of_the_stop(seed):
    """Three ranks meet in the middle of each step, as in a collective, and learn of a stop at random moments."""
    draw, world = random.Random(seed), 3
    for _ in range(10):
        agreements, stops = [Agreement() for _ in range(world)], []
        meeting = threading.Barrier(world, timeout=20)
        reports, delays = {}, [[draw.random() * 0.004 for _ in range(40)] for _ in range(world)]
        learns, hears = ([draw.random() * 0.02 for _ in range(world)] for _ in range(2))

        def run(rank, agreements=agreements, stops=stops, meeting=meeting, delays=delays):
            for step, delay in enumerate(delays[rank], start=1):
                time.sleep(delay)
                meeting.wait()
                if agreements[rank].passes():
                    stops.append(step)
                    return

        def exchange(rank, agreements=agreements, reports=reports, learns=learns, hears=hears):
            time.sleep(learns[rank])
            reports[rank] = agreements[rank].report()
            while len(reports) < world:
                time.sleep(0.001)
            time.sleep(hears[rank])
            agreements[rank].decide(max(reports.values()))

        threads = [threading.Thread(target=f, args=(rank,)) for f in (run, exchange) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(stops) == world and len(set(stops)) == 1


def test_second_interrupt_stops_at_once_while_a_step_blocks(tmp_path, flags):
    script = tmp_path / "blocked.py"
    script.write_text(
        "import os, signal, sys, time\nimport lightning_gpt\nfrom lightning import Callback\n"
        "class Block(Callback):\n"
        "    def on_before_backward(self, *_):\n"
        "        for _ in range(2):\n            os.kill(os.getpid(), signal.SIGINT)\n            time.sleep(1)\n"
        "        time.sleep(600)\n"
        "lightning_gpt.train(lightning_gpt.parse_train(sys.argv[1:]), callbacks=[Block()])\n"
    )
    command = [sys.executable, str(script), *flags, f"--out_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "SIGINT: stopping at the end of this step; Ctrl-C stops at once\n" in done.stderr


@pytest.mark.slow
def test_signal_to_all_processes_spares_the_data_workers(tmp_path, flags):
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(REPO / "train.py"),
        *flags,
        f"--out_dir={run}",
        "--num_workers=2",
        "--max_steps=1000000",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 10: "):
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 143 and f"stopped at step {saved(run)['global_step']}; " in rest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("handler", "max_steps", "code"),
    [("SIG_DFL", 1000000, 129), ("SIG_IGN", 300, 0)],
    ids=["saves", "goes on where SIGHUP is ignored"],
)
def test_closed_terminal(tmp_path, flags, handler, max_steps, code):
    run, (ours, theirs) = tmp_path / "run", os.openpty()
    command = [sys.executable, str(REPO / "train.py"), *flags, f"--out_dir={run}", f"--max_steps={max_steps}"]
    child = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0);"
        f" signal.signal(signal.SIGHUP, signal.{handler}); os.execv(sys.executable, sys.argv[1:])"
    )
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", child, *command], cwd=tmp_path, **terminal)
    os.close(theirs)
    seen = b""
    while b"step 10: " not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=120) == code
    assert saved(run)["global_step"] == max_steps if code == 0 else saved(run)["global_step"] >= 10
