"""House rules: imports between rooms, file lengths, and forbidden code.

A room is a package or module directly below lightning_gpt.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
ENTRY_POINTS = sorted(p for p in REPO.glob("*.py") if p.name != "setup.py")
MODELS = ("mingpt", "nanogpt", "moderngpt")
LIBRARY = sorted(p for room in ("lightning_gpt", *MODELS) for p in (REPO / room).rglob("*.py"))
CODE = [*ENTRY_POINTS, *LIBRARY]
HEAVY = {"deepspeed", "transformers", "tiktoken", "tokenizers", "datasets", "pyarrow", "zstandard", "huggingface_hub"}
HEAVY |= {"lm_eval", "matplotlib"}
# What scripts for minGPT and nanoGPT import besides the models. Inside functions these may call lightning_gpt, so that
# the tokenizer, the parameter groups and the count of FLOPs are not written twice; the models themselves stay plain.
LINEAGE = {"mingpt/bpe.py", "mingpt/trainer.py", "mingpt/utils.py", "nanogpt/training.py"}

# What only the pages of app.py need, and may import at once.
OF_APP = {"streamlit", "altair", "pandas"}

# The rooms from the highest to the lowest, each with the rooms that it imports.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli", "config"},  # it imports the command that was asked for by its name
    "commands": {
        *("app", "evaluation", "bench", "training", "sampling", "cli", "checkpoint", "data", "config", "invocation"),
    },
    # The pages of app.py show what the other rooms compute.
    "app": {
        *("bench", "training", "sampling", "checkpoint", "models", "strategies", "tokenizers"),
        *("implementations", "planning", "config", "invocation"),
    },
    "evaluation": {
        "invocation",
        *("training", "sampling", "checkpoint", "models", "data", "strategies", "tokenizers", "implementations"),
        *("trust", "charts", "atomic", "config", "progress"),
    },
    "bench": {
        *(
            "training",
            "sampling",
            "cli",
            "checkpoint",
            "models",
            "data",
            "optim",
            "strategies",
            "tokenizers",
            "implementations",
        ),
        *("planning", "parsing", "checksums", "charts", "atomic", "config"),  # bench.py plan compares plans with files
    },
    "callbacks": {"training", "strategies"},
    "training": {
        "invocation",
        *("sampling", "planning", "checkpoint", "models", "data", "optim", "strategies", "tokenizers"),
        *("implementations", "trust", "checksums", "config", "atomic", "launch", "progress", "charts"),
    },
    "sampling": {"checkpoint", "data", "models", "strategies", "tokenizers", "implementations", "config"},
    "cli": {
        "invocation",
        *("checkpoint", "data", "optim", "implementations"),
        *("checksums", "trust", "parsing", "options", "config", "launch"),
    },
    "planning": {"models", "strategies", "implementations", "config"},
    "checkpoint": {
        "invocation",
        *("models", "data", "tokenizers", "implementations", "checksums", "trust", "parsing", "atomic", "config"),
        "progress",
    },
    "models": {"optim", "implementations", "trust", "config"},
    "data": {"tokenizers", "trust", "parsing", "atomic", "config", "invocation"},
    "optim": {"options", "config"},
    "strategies": {"checksums", "parsing", "atomic", "config", "invocation"},
    "tokenizers": {"parsing", "atomic", "config", "invocation"},
    "implementations": {"trust", "options", "config"},
    "checksums": {"atomic", "config"},
    "trust": {"atomic", "config"},
    "parsing": {"config"},
    "charts": {"atomic", "config", "invocation"},
    "atomic": {"config"},  # the user's error for a file that cannot be written
    "config": {"options"},
    "options": set(),
    "launch": set(),
    "invocation": set(),
    "progress": set(),
}


def _name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def _imported(statement: ast.AST) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, "imports are absolute"
        # `from lightning_gpt import data` also imports a room.
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    return []


def _imports(path: Path) -> set[str]:
    """Return the dotted names of all imports of a file, including those in functions."""
    return {name for node in ast.walk(_tree(path)) for name in _imported(node)}


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import time, which excludes the bodies of functions."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            yield from _at_import_time(statement.orelse)
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from _at_import_time(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from _at_import_time(handler.body)


def _packages_at_import_time(path: Path) -> set[str]:
    names = {name for statement in _at_import_time(_tree(path).body) for name in _imported(statement)}
    return {name.partition(".")[0] for name in names}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _room(dotted: str) -> str | None:
    """Return the room of a dotted name, or None outside of lightning_gpt's rooms."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "lightning_gpt" and len(parts) > 1 else None


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_file_imports_only_allowed_rooms(path):
    names = _imports(path)
    packages = {name.partition(".")[0] for name in names}
    package, *rest = path.relative_to(REPO).with_suffix("").parts
    assert not packages & {p.stem for p in ENTRY_POINTS}, "nothing imports an entry point"
    if package in MODELS:
        # transformers only inside functions; another test checks that
        lazily = {"lightning_gpt", "numpy"} if _name(path) in LINEAGE else set()
        assert packages - set(sys.stdlib_module_names) <= {"torch", "transformers", package} | lazily
        assert not _packages_at_import_time(path) & lazily
        return
    room = rest[0]
    if room == "__init__":  # imports the public names lazily
        return
    assert room in MAY_IMPORT, "a new room: add it to MAY_IMPORT"
    assert _rooms(names) <= MAY_IMPORT[room] | {room}
    if room in ("config", "options"):
        assert packages <= set(sys.stdlib_module_names) | {"lightning_gpt"}
    if room != "implementations":
        assert not packages & set(MODELS), "models are reached through the registry"


def _rooms(names: set[str]) -> set[str]:
    return {room for room in map(_room, names) if room and room != "__version__"}


def test_rooms_import_downwards():
    order = list(MAY_IMPORT)
    for room, below in MAY_IMPORT.items():
        assert below <= set(order[order.index(room) + 1 :]), room


def test_every_allowed_import_is_used():
    used: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for path in LIBRARY:
        package, *rest = path.relative_to(REPO).with_suffix("").parts
        if package == "lightning_gpt" and rest != ["__init__"]:
            used[rest[0]] |= _rooms(_imports(path)) - {rest[0]}
    assert used == MAY_IMPORT


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=_name)
def test_entry_point_calls_the_command_of_its_name(path):
    assert _imports(path) == {f"lightning_gpt.commands.{path.stem}.main"}


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_heavy_packages_are_not_imported_at_import_time(path):
    is_page = path.is_relative_to(REPO / "lightning_gpt" / "app")
    assert not _packages_at_import_time(path) & (HEAVY if is_page else HEAVY | OF_APP)


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_code_does_not_compare_implementation_or_strategy_names(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            subjects = {ast.unparse(side).rpartition(".")[2] for side in sides}
            texts = [s for side in sides for s in ast.walk(side) if isinstance(s, ast.Constant)]
            is_named = subjects & {"implementation", "strategy"} and any(isinstance(t.value, str) for t in texts)
            assert not is_named, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Match):
            assert ast.unparse(node.subject).rpartition(".")[2] not in ("implementation", "strategy")


def _max_lines(path: Path) -> int:
    return 450 if path.is_relative_to(REPO / "tests") else 400


@pytest.mark.parametrize("path", [*CODE, *sorted((REPO / "tests").rglob("*.py"))], ids=_name)
def test_file_is_short_ascii_and_named_after_its_content(path):
    if _name(path) not in LINEAGE:  # mingpt/utils.py has minGPT's name
        assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= _max_lines(path)
    assert path.read_bytes().isascii()


def test_data_imports_run_from_loading_to_text():
    order = ["characters", "loading", "tasks", "streams", "tokens", "text"]
    for path in sorted((REPO / "lightning_gpt" / "data").rglob("*.py")):
        room = path.relative_to(REPO / "lightning_gpt" / "data").with_suffix("").parts[0]
        if room != "__init__":
            parts = [name.split(".") for name in _imports(path) if name.startswith("lightning_gpt.data.")]
            assert {part[2] for part in parts} <= set(order[order.index(room) :]), path


@pytest.mark.parametrize("command", [*(path.stem for path in ENTRY_POINTS), "bench tax"])
def test_help_does_not_import_torch(command):
    entry, *argv = command.split()
    code = (
        f"import sys, {entry} as entry, contextlib\n"
        f"with contextlib.suppress(SystemExit): entry.main({[*argv, '--help']})\n"
        f"print(*{{'torch', 'lightning', 'numpy', *{HEAVY | OF_APP}}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    *text, imported = done.stdout.splitlines()
    assert text[0].startswith("usage: ") and imported == "", done.stdout
