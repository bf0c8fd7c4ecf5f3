"""The house rules: who may import whom, how long a file may be, and what may not be written."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
ENTRY_POINTS = sorted(REPO.glob("*.py"))
MODELS = ("mingpt", "nanogpt", "moderngpt")
LIBRARY = sorted(p for room in ("lightning_gpt", *MODELS) for p in (REPO / room).rglob("*.py"))
CODE = [*ENTRY_POINTS, *LIBRARY]
HEAVY = {"deepspeed", "transformers", "tiktoken", "tokenizers", "datasets", "pyarrow", "zstandard", "huggingface_hub"}
HEAVY |= {"lm_eval", "matplotlib"}

# The rooms of lightning_gpt, highest first; a folder is one room. Each may import some of the rooms below it.
MAY_IMPORT: dict[str, set[str]] = {
    "evaluation": {
        *("training", "sampling", "checkpoint", "models", "data", "strategies", "tokenizers", "implementations"),
        *("config",),
    },
    "bench": {
        *("training", "cli", "checkpoint", "models", "data", "optim", "strategies", "tokenizers", "implementations"),
        *("config",),
    },
    "training": {
        *("sampling", "planning", "checkpoint", "models", "data", "optim", "strategies", "tokenizers"),
        *("implementations", "config"),
    },
    "sampling": {"checkpoint", "models", "strategies", "tokenizers", "implementations", "config"},
    "cli": {"checkpoint", "data", "implementations", "options", "config"},
    "planning": {"models", "strategies", "implementations", "config"},
    "checkpoint": {"models", "data", "tokenizers", "implementations", "atomic", "config"},
    "models": {"optim", "implementations"},
    "data": {"tokenizers", "config"},
    "optim": {"implementations", "config"},
    "strategies": {"atomic", "config"},
    "tokenizers": {"config"},
    "implementations": {"options", "config"},
    "options": set(),
    "atomic": set(),
    "config": set(),
}


def _name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def _imported(statement: ast.AST) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, "imports are absolute"
        # `from lightning_gpt import data` names a room as well.
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    return []


def _imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file, in functions too."""
    return {name for node in ast.walk(_tree(path)) for name in _imported(node)}


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: also those in an if, try or class, but in no function."""
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


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _room(dotted: str) -> str | None:
    """The room of lightning_gpt that a dotted name lies in; None for other packages and the package itself."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "lightning_gpt" and len(parts) > 1 else None


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_who_imports_whom(path):
    names = _imports(path)
    packages = {name.partition(".")[0] for name in names}
    package, *rest = path.relative_to(REPO).with_suffix("").parts
    assert not packages & {p.stem for p in ENTRY_POINTS}, "nothing imports an entry point"
    if package in MODELS:
        # transformers in a function alone, see below
        assert packages - set(sys.stdlib_module_names) <= {"torch", "transformers", package}
        return
    room = rest[0]
    if room == "__init__":  # public names, which are imported lazily
        return
    assert room in MAY_IMPORT, "a new room: say in MAY_IMPORT whom it may import"
    assert _rooms(names) <= MAY_IMPORT[room] | {room}
    if room in ("config", "options"):
        assert packages <= set(sys.stdlib_module_names)
    if room != "implementations":
        assert not packages & set(MODELS), "models are reached through the registry"


def _rooms(names: set[str]) -> set[str]:
    return {room for room in map(_room, names) if room and room != "__version__"}


def test_arrows_run_downwards():
    order = list(MAY_IMPORT)
    for room, below in MAY_IMPORT.items():
        assert below <= set(order[order.index(room) + 1 :]), room


def test_every_arrow_is_used():
    used: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for path in LIBRARY:
        package, *rest = path.relative_to(REPO).with_suffix("").parts
        if package == "lightning_gpt" and rest != ["__init__"]:
            used[rest[0]] |= _rooms(_imports(path)) - {rest[0]}
    assert used == MAY_IMPORT


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=_name)
def test_entry_point(path):
    packages = {name.partition(".")[0] for name in _imports(path)}
    assert packages - set(sys.stdlib_module_names) <= {"lightning_gpt"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    functions = [n for n in _tree(path).body if isinstance(n, ast.FunctionDef)]
    main = next(f for f in functions if f.name == "main")
    assert len(main.args.args) == len(main.args.defaults) == 1, "main(argv=None)"


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_heavy_packages_are_imported_where_they_are_needed(path):
    names = {name for statement in _at_import_time(_tree(path).body) for name in _imported(statement)}
    assert not {name.partition(".")[0] for name in names} & HEAVY


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_registries_instead_of_comparisons(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            subjects = {ast.unparse(side).rpartition(".")[2] for side in sides}
            texts = [s for side in sides for s in ast.walk(side) if isinstance(s, ast.Constant)]
            is_named = subjects & {"implementation", "strategy"} and any(isinstance(t.value, str) for t in texts)
            assert not is_named, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Match):
            assert ast.unparse(node.subject).rpartition(".")[2] not in ("implementation", "strategy")


@pytest.mark.parametrize("path", [*CODE, *sorted((REPO / "tests").rglob("*.py"))], ids=_name)
def test_file_is_about_one_idea(path):
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    assert path.read_bytes().isascii()
