"""The source archive and the wheel made of it, which is installed into a folder of its own and used from another."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.launching import REPO

SOURCES = "lightning_gpt mingpt nanogpt moderngpt configs requirements requirements.txt".split()
SOURCES += "setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md".split()
TINY = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=2 --sample_tokens=4 --logger=csv"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder that the wheel is installed into; skip where this environment cannot build one."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a build writes beside the sources
        source = REPO / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "sources" / name)
    archive = [sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"]
    done = subprocess.run(archive, cwd=folder / "sources", capture_output=True, text=True)
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("this environment's setuptools cannot build the archive")
    assert done.returncode == 0, done.stderr
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*build, next(folder.glob("*.tar.gz"))], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={folder / 'site'}", wheel], check=True)
    return wheel, folder / "site"


@pytest.mark.slow
def test_wheel_holds_the_packages_and_no_script_of_the_clone(installed):
    wheel, site = installed
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {"lightning_gpt", "mingpt", "nanogpt", "moderngpt", "bin"}
    configs = {name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    assert configs == {file.name for file in (REPO / "configs").iterdir()}


@pytest.mark.slow
def test_installed_program_trains_and_its_last_line_works(installed, text_file, tmp_path):
    _, site = installed
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(site), "PATH": f"{site / 'bin'}{os.pathsep}{env['PATH']}", "PYTHONSAFEPATH": "1"}

    def run(command):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = [*TINY.split(), f"--data={text_file}", "--out_dir=run", "--accelerator=cpu", "--prompt=the"]
    printed = run(["lightning-gpt", "train", "--config=configs/chargpt.yaml", *flags])
    command = re.search(r"^next: (.*)", printed, re.MULTILINE)
    assert command and command[1] == "lightning-gpt sample --checkpoint run"
    assert run([*shlex.split(command[1]), "--max_new_tokens=3", "--prompt=the"]).startswith("the")
