"""Read nanoGPT's config files, and say what command lines of Hydra are here."""

import ast
import operator
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_gpt.config import UserError

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def read_assignments(path: str, *, optional: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """Yield the settings of a nanoGPT config file, each as name, value and line number. The file is not executed.

    Imports and docstrings are passed over.

    Args:
        path: The file.
        optional: Names that are left out if their value is no constant.

    Raises:
        UserError: The file cannot be read, or has a line that is no assignment of a constant or constant arithmetic.
    """
    try:
        body = ast.parse(Path(path).read_text(encoding="utf-8")).body
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not valid Python: {error}") from error
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        place = f"{path}, line {statement.lineno}"
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if not (isinstance(statement, ast.Assign) and len(targets) == 1 and isinstance(targets[0], ast.Name)):
            raise UserError(
                f"{place}: only assignments such as batch_size = 12 are read; give the other settings as flags"
            )
        name = targets[0].id
        try:
            value = _constant(statement.value)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError) as error:
            if name in optional:
                continue
            raise UserError(
                f"{place}: the value of {name} is not a constant, and files are not executed; give --{name}=VALUE"
            ) from error
        yield name, str(value), statement.lineno


def _constant(node: ast.expr) -> object:
    """Return the value of a constant, or of arithmetic on numbers.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_number(node.left), _number(node.right))
    raise ValueError("no constant")


def _number(node: ast.expr) -> float:
    value = _constant(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return value


# Hydra's usual config groups, each with our flag.
_GROUPS = {
    "data": "data",
    "datamodule": "data",
    "dataset": "data",
    "logger": "logger",
    "model": "model_type",
    "optim": "optimizer",
    "optimizer": "optimizer",
    "strategy": "strategy",
    "trainer": "strategy",
}


def refuse_hydra(argv: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise a UserError with the equivalent command if a command line has Hydra's form.

    Args:
        argv: The command line.
        names: Our flags for the names of other programs.
    """
    theirs, ours = [], []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if name in ("--config-name", "-cn"):
            value = value if equals or not tokens else tokens.pop(0)
            theirs.append(f"{name}={value}")
            ours.append(f"--config=configs/{value.removesuffix('.yaml')}.yaml")
        elif name in ("--multirun", "-m"):
            theirs.append(token)
        elif re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w./]*=.*", token, re.DOTALL):
            theirs.append(token)
            ours.append(_own_flag(name.lstrip("+~"), value, names))
        else:
            ours.append(token)
            if token.startswith("--") and not equals and tokens and not tokens[0].startswith("--"):
                ours.append(tokens.pop(0))
    if theirs:
        raise UserError(f"{' '.join(theirs)} is Hydra's form; here: python train.py {shlex.join(ours)}")


def _own_flag(name: str, value: str, names: Mapping[str, str]) -> str:
    if name in _GROUPS:
        is_implementation = name == "model" and value in ("mingpt", "nanogpt", "moderngpt")
        return f"--{'implementation' if is_implementation else _GROUPS[name]}={value}"
    field = name.rpartition(".")[2]
    return f"{names.get(field, '--' + field)}={value}"
