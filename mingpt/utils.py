"""What minGPT's scripts share: a config of nested attributes, seeding, and a record of the settings."""

import ast
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def set_seed(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch, on all devices."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def setup_logging(config: "CfgNode") -> None:
    """Write the command line to ``args.txt`` and the config to ``config.json``, in ``config.system.work_dir``."""
    work_dir = Path(config.system.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / "args.txt").write_text(" ".join(sys.argv), encoding="utf-8")
    (work_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=4), encoding="utf-8")


class CfgNode(SimpleNamespace):
    """A config: attributes that are values or further configs, as in ``config.model.n_layer``."""

    def __str__(self) -> str:
        lines = []
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                lines += [f"{name}:", *(f"    {line}" for line in str(value).splitlines())]
            else:
                lines.append(f"{name}: {value}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dictionary, nested configs included."""
        return {name: v.to_dict() if isinstance(v, CfgNode) else v for name, v in vars(self).items()}

    def merge_from_dict(self, d: Mapping[str, Any]) -> None:
        """Set attributes, which may be new; a nested config is replaced."""
        vars(self).update(d)

    def merge_from_args(self, args: Sequence[str]) -> None:
        """Set existing attributes from the command line, and print each one.

        Args:
            args: Such as ``--model.n_layer=10``. A value that is not a Python literal is a string.

        Raises:
            ValueError: An argument has another form, or names no attribute; those before it are set.
        """
        for arg in args:
            name, equals, text = arg.partition("=")
            if not (name.startswith("--") and equals):
                raise ValueError(f"{arg}: expected --name=value, such as --model.n_layer=10")
            node, leaf = self._find(name.removeprefix("--"))
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            print(f"command line overwriting config attribute {name.removeprefix('--')} with {value}")
            setattr(node, leaf, value)

    def _find(self, dotted: str) -> tuple[Any, str]:
        """Return the config that has an attribute such as ``model.n_layer``, and the last part of the name."""
        node: Any = self
        *parents, leaf = dotted.split(".")
        for name in [*parents, leaf]:
            known = getattr(node, "__dict__", {})
            if name not in known:
                raise ValueError(f"--{dotted}: the config has no {name} there; it has {', '.join(known) or 'nothing'}")
            node, parent = known[name], node
        return parent, leaf
