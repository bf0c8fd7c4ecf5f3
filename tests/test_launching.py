"""Programs in warm processes: arguments, environment, exit codes and output are those of `python` and torchrun."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest

from tests.launching import REPO, run_python

SHOW = """
import json, os, sys
import lightning_gpt
from beside import NAME

print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("LEFT"), __name__, NAME]))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_script_runs_as_with_python(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SHOW)
    (tmp_path / "beside.py").write_text("NAME = 'beside the script'")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "this process only")
    monkeypatch.setenv("LEFT", "as it was")
    command = [str(tmp_path / "script.py"), "3", "--flag=a b"]
    for env in ({}, {"LEFT": "changed"}):
        env |= {"PYTHONPATH": str(REPO)}
        ours = run_python(*command, cwd=tmp_path / "elsewhere", env=env)
        theirs = subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "elsewhere", env=os.environ | env, capture_output=True, text=True
        )
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
        assert json.loads(ours.stdout)[2:] == [env.get("LEFT", "as it was"), "__main__", "beside the script"]


def test_exception_is_reported_and_later_programs_are_unaffected():
    failed = run_python("-c", "import os; os.environ['LEFT'] = '1'; 1 / 0")
    assert failed.returncode == 1 and failed.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert run_python("-c", "import os; print(os.environ.get('LEFT'))").stdout == "None\n"


def test_ranks_form_a_process_group():
    code = """
    import sys, torch, torch.distributed as dist

    dist.init_process_group("gloo")
    number = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(number)
    sys.stdout.write(f"sum {number.item()}\\n")
    """
    assert run_python("-c", textwrap.dedent(code), ranks=2).stdout == "sum 3\n" * 2


def test_failed_rank_ends_the_others():
    code = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(200)"
    assert run_python("-c", code, ranks=2, timeout=100).returncode == 7


def test_ranks_are_killed_after_the_timeout():
    before = set(multiprocessing.active_children())  # of other tests
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", "import time; time.sleep(200)", ranks=2, timeout=0.5)
    assert set(multiprocessing.active_children()) <= before
