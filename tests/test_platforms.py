"""Windows and macOS: everything is imported, trained and sampled without the modules and functions that Linux has."""

import pytest

from tests.launching import REPO, run_python

# Script: forget our packages, remove what Windows lacks, import every module again, and run two commands.
WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys

OURS = ("lightning_gpt", "mingpt", "nanogpt", "moderngpt", "train", "sample")
for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"):
    sys.modules[name] = None
names = "fork register_at_fork sched_getaffinity getuid geteuid killpg setsid getloadavg O_DIRECTORY"
for name in names.split():
    delattr(os, name)
for name in "SIGHUP SIGUSR1 SIGUSR2 SIGKILL SIGSTOP SIGCONT SIGQUIT SIGALRM SIGCHLD SIGPIPE".split():
    delattr(signal, name)
import lightning_gpt
for module in pkgutil.walk_packages(lightning_gpt.__path__, "lightning_gpt."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name in ("streamlit", "altair", "pandas", "lm_eval"), error
import sample, train
train.main([*sys.argv[1:], "--out_dir=run"])
sample.main(["--checkpoint=run", "--max_new_tokens=3", "--prompt=the", "--accelerator=cpu"])
"""


@pytest.mark.slow
def test_everything_works_without_what_windows_lacks(tiny_flags, text_file, tmp_path):
    done = run_python(
        "-c", WITHOUT_POSIX, *tiny_flags, f"--data={text_file}", cwd=tmp_path, env={"PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    *printed, sampled = done.stdout.split("next: ")
    assert "tokens/s" in printed[0] and "peak memory" not in printed[0]
    assert sampled.splitlines()[1].startswith("the")
