"""What to type next: commands and installations, in the form that works where this process was started."""

import shlex
import shutil
import sys
from pathlib import Path

DISTRIBUTION = "lightning-gpt-trainer"
"""name on PyPI, where another project has the name lightning-gpt"""
PROGRAM = "lightning-gpt"
ROOT = Path(__file__).parents[1]
"""the clone; for an installed package, the folder of all packages"""
EXTRAS = {"huggingface": "hf", "lm_eval": "lm-eval"}
"""extras of the package that are not named like their file in requirements/"""


def usage(command: str) -> str:
    """Return how a command is called: "train.py" from a clone's script, else "lightning-gpt train"."""
    return f"{PROGRAM} {command}" if _is_program() else f"{command}.py"


def command_line(command: str, arguments: str = "") -> str:
    """Return a shell command that runs a command of this project from the current directory.

    Args:
        command: "train", "evaluate", "sample", "prepare" or "bench".
        arguments: Its arguments, quoted for a shell.
    """
    started = Path(sys.argv[0])
    if _is_program():
        call = _python("-m lightning_gpt") if started.name == "__main__.py" else _found(started)
        call = f"{call} {command}"
    elif started.suffix == ".py" and started.with_name(f"{command}.py").exists():
        call = _python(shlex.quote(str(started.with_name(f"{command}.py"))))
    else:
        call = _python(f"{command}.py" if _is_clone() else f"-m lightning_gpt {command}")
    return f"{call} {arguments}".rstrip()


def install_line(*names: str) -> str:
    """Return the shell command that installs optional packages.

    Args:
        names: Files of ``requirements/``, without their suffix.
    """
    if _is_clone():
        return f"pip install {' '.join(f'-r requirements/{name}.txt' for name in names)}"
    return f"pip install '{DISTRIBUTION}[{','.join(EXTRAS.get(name, name) for name in names)}]'"


def find_config(path: str) -> str:
    """Return a ``--config`` file; a missing ``configs/NAME.yaml`` is looked up among the project's own."""
    if Path(path).exists() or Path(path).parent != Path("configs"):
        return path
    shipped = (folder / Path(path).name for folder in (ROOT / "configs", Path(__file__).with_name("configs")))
    return next((str(file) for file in shipped if file.exists()), path)


def _is_program() -> bool:
    """Return whether the console script, or ``python -m lightning_gpt``, started this process."""
    started = Path(sys.argv[0])
    return started.stem == PROGRAM or started == Path(__file__).with_name("__main__.py")


def _is_clone() -> bool:
    return (ROOT / "requirements").is_dir() and (ROOT / "train.py").exists()


def _found(program: Path) -> str:
    """Return what the shell needs to find a program: its name if it is the first one of that name in PATH."""
    first = shutil.which(program.name)
    return program.name if first and Path(first) == program else shlex.quote(str(program))


def _python(arguments: str) -> str:
    for name in ("python", "python3"):
        first = shutil.which(name)
        if first and Path(first).parent == Path(sys.executable).parent:
            return f"{name} {arguments}"
    return f"{shlex.quote(sys.executable)} {arguments}"
