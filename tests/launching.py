"""Run Python programs in warm processes: forks of a server that has imported this project and its libraries.

Importing torch and Lightning takes longer than most of what a program does in a test. A fork starts after the imports,
in the state of a new interpreter: the server runs no code of this project, and starts no thread. Tests of signals, of
pipes and of the launchers themselves start their processes with `subprocess`.
"""

import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path

import torch.distributed

REPO = Path(__file__).parents[1]
IMPORTED = ["lightning_gpt.training.run", "lightning_gpt.evaluation.evaluate", "torch._inductor.compile_fx"]
IMPORTED += ["matplotlib.figure", "matplotlib.backends.backend_agg", "torch.utils.tensorboard", "safetensors.torch"]
if torch.version.cuda is None and importlib.util.find_spec("deepspeed"):  # it looks for a GPU when it is imported
    IMPORTED += ["deepspeed"]

# Script: make several calls of entry points, one after another. Its argument lists the entry point and flags of each.
CALLS = """
import importlib, json, sys

for entry_point, *flags in json.loads(sys.argv[1]):
    importlib.import_module(entry_point).main(flags)
"""


def run_calls(
    *calls: list[str], ranks: int = 1, cwd: Path = REPO, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Make several calls of entry points in one group of processes, each as ["train", "--max_steps=1", ...]."""
    env = {"PYTHONPATH": str(REPO)}
    return run_python("-c", CALLS, json.dumps(calls), ranks=ranks, cwd=cwd, env=env, timeout=timeout)


def run_python(
    *command: object, ranks: int = 1, cwd: Path = REPO, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND`, or as many of it as torchrun starts on one machine, and wait for the end.

    Args:
        command: Path of a script, or "-c" and code; then the arguments.
        ranks: Number of processes. More than one get the environment that torchrun sets.
        cwd: Working directory.
        env: Environment variables to change; this process's environment has the others.
        timeout: Limit in seconds.

    Returns:
        The exit code of the first rank that failed, or 0, and the output of all ranks.

    Raises:
        subprocess.TimeoutExpired: A rank still ran after the timeout. All ranks have been killed.
    """
    argv, context = [str(argument) for argument in command], _server()
    shared = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    shared |= {"OMP_NUM_THREADS": "1", **(env or {})}
    store = None
    if ranks > 1:  # as under torchrun, the launcher holds the store where ranks meet, so that it knows a free port
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        jobs = []
        for rank in range(ranks):
            own = shared | (_torchrun_environment(rank, ranks, store.port) if store else {})
            jobs.append(context.Process(target=_run, args=(argv, str(cwd), own, out, err)))
            jobs[-1].start()
        try:
            code = _wait(jobs, timeout)
        finally:
            for job in jobs:
                job.kill()
                job.join()
        texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in (out, err)]
    if code is None:
        raise subprocess.TimeoutExpired(argv, timeout, *texts)
    return subprocess.CompletedProcess(argv, code, *texts)


def _wait(jobs: list[multiprocessing.Process], timeout: float) -> int | None:
    """Wait until all processes have ended, or one has failed; return its exit code, else 0, or None in time."""
    end, running = time.monotonic() + timeout, {job.sentinel: job for job in jobs}
    while running:
        ended = connection.wait(running, max(0, end - time.monotonic()))
        if not ended:
            return None
        for sentinel in ended:
            job = running.pop(sentinel)
            job.join()
            if job.exitcode:
                return job.exitcode
    return 0


def _server() -> multiprocessing.context.ForkServerContext:
    """Return the context of the server, which starts on first use and ends with this process."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = os.environ.copy()
    searched = os.pathsep.join(filter(None, [str(REPO), before.get("PYTHONPATH")]))
    # Inductor would start a pool of processes when it is imported.
    os.environ |= {"PYTHONPATH": searched, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    ours = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ours |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    return {name: str(value) for name, value in ours.items()}


def _run(argv: list[str], cwd: str, env: dict[str, str], out: Path, err: Path) -> None:
    """Become `python ARGV` in a forked process."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first = cwd if argv[0] == "-c" else str(Path(argv[0]).resolve().parent)
    searched = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *searched, *(path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix)))]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
