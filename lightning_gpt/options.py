"""From a config dataclass to its options: names, types, defaults, and the strings below its fields."""

import ast
import dataclasses
import inspect
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """One field of a config dataclass, as a flag: name, type annotation, default and help line.

    One with `positional` in its metadata is given without a flag, any number of times.
    """

    name: str
    type: Any
    default: Any
    help: str
    positional: bool = False


def options_of(cls: type, source: str | None = None) -> list[Option]:
    """Reads a config dataclass: its fields, and the strings below them, which Python itself does not keep.

    Args:
        cls: The dataclass.
        source: Its source text; by default looked up, and help lines stay empty where there is none (a notebook).
    """
    if source is None:
        try:
            source = inspect.cleandoc("\n" + inspect.getsource(cls))
        except OSError:
            source = ""
    statements = [s for node in ast.parse(source).body if isinstance(node, ast.ClassDef) for s in node.body]
    docs = {}
    for statement, after in zip(statements, statements[1:], strict=False):
        is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_doc:
            docs[statement.target.id] = " ".join(str(after.value.value).split())
    types = typing.get_type_hints(cls)  # under `from __future__ import annotations` a field's own type is a text
    found = []
    for f in dataclasses.fields(cls):
        default = None if f.default is dataclasses.MISSING else f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        positional = f.metadata.get("positional", False)
        found.append(Option(f.name, types[f.name], default, docs.get(f.name, ""), positional))
    return found


def options_in_file(path: str, class_name: str) -> list[Option]:
    """Reads a config dataclass out of a source file without importing the file, which may import torch.

    Only the class statement is run, so its annotations and defaults must need no more than ``dataclasses``.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    lines = text.splitlines()
    source = "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
    namespace: dict[str, Any] = {"__name__": __name__, "dataclass": dataclass, "field": field}
    exec(compile(source, path, "exec"), namespace)
    return options_of(namespace[class_name], source)
