"""Declare command-line options as fields of a dataclass, and read such declarations.

A field's annotation is the flag's type, its default is the flag's default, and the string below it is the flag's help.
Numbers with a limited range are annotated with one of the types below, such as ``PositiveInt``.
"""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any


@dataclass(frozen=True)
class Limit:
    """A condition on an option's value, and a description of the allowed values for the error message."""

    allows: Callable[[float], bool]
    expected: str


ABOVE_ZERO = Limit(lambda value: value > 0, "a number above 0")
PositiveInt = Annotated[int, ABOVE_ZERO]
PositiveFloat = Annotated[float, ABOVE_ZERO]
NonNegativeInt = Annotated[int, Limit(lambda value: value >= 0, "0 or more")]
NonNegativeFloat = Annotated[float, Limit(lambda value: value >= 0, "0 or more")]
Probability = Annotated[float, Limit(lambda value: 0 < value <= 1, "a number above 0, at most 1")]
Fraction = Annotated[float, Limit(lambda value: 0 < value < 1, "above 0 and below 1")]
Beta = Annotated[float, Limit(lambda value: 0 <= value < 1, "at least 0 and below 1")]
Share = Annotated[float, Limit(lambda value: 0 <= value <= 1, "from 0 to 1")]
Seed = Annotated[int, Limit(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")]


@dataclass(frozen=True)
class Option:
    """One field of a config dataclass, as a flag.

    Attributes:
        name: Name of the field, and of the flag without its dashes.
        type: The annotation, without its limit.
        default: The field's default.
        help: The help line.
        positional: Whether any number of values is given without a flag; set in the field's metadata.
        limit: Limit on the number; None allows all.
    """

    name: str
    type: Any
    default: Any
    help: str
    positional: bool = False
    limit: Limit | None = None


def options_of(cls: type, source: str | None = None) -> list[Option]:
    """Return the options that a config dataclass declares.

    Args:
        cls: The dataclass.
        source: Source text of the dataclass, which holds the help lines; Python does not keep them at run time. None
            looks it up; if there is none, as in a notebook, the help lines are empty.
    """
    if source is None:
        try:
            source = inspect.cleandoc("\n" + inspect.getsource(cls))
        except OSError:
            source = ""
    statements = [s for node in ast.parse(source).body if isinstance(node, ast.ClassDef) for s in node.body]
    docs = {}
    for statement, after in zip(statements, statements[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(after.value.value).split())
    types, annotations = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    found = []
    for f in dataclasses.fields(cls):
        default = None if f.default is dataclasses.MISSING else f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        positional, limit = f.metadata.get("positional", False), _limit(annotations[f.name])
        found.append(Option(f.name, types[f.name], default, docs.get(f.name, ""), positional, limit))
    return found


def _limit(annotation: Any) -> Limit | None:
    """Return the limit of an annotation such as ``PositiveInt`` or ``PositiveInt | None``."""
    extras = getattr(annotation, "__metadata__", ())
    limits = [extra for extra in extras if isinstance(extra, Limit)] or map(_limit, typing.get_args(annotation))
    return next((limit for limit in limits if limit), None)


def options_in_file(path: str, class_name: str) -> list[Option]:
    """Return the options of a config dataclass in a source file, without importing the file, which may import torch.

    Only the class statement is executed, so its annotations and defaults must need no more than ``dataclasses``.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    lines = text.splitlines()
    source = "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
    namespace: dict[str, Any] = {"__name__": __name__, "dataclass": dataclass, "field": field}
    exec(compile(source, path, "exec"), namespace)
    return options_of(namespace[class_name], source)
