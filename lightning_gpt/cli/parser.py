"""The parser: turns options into flags, values into config objects, and user errors into one line."""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from lightning_gpt.cli.nanogpt_flags import NAMES_ELSEWHERE
from lightning_gpt.cli.numbers import optional_whole_number, whole_number
from lightning_gpt.config import EXCLUSIVE, PROVENANCE, SIZES, UserError
from lightning_gpt.config.elsewhere import PASSED_ON
from lightning_gpt.options import ABOVE_ZERO, Option
from lightning_gpt.parsing import read_yaml

ALIASES = {
    "accumulate_grad_batches": "--grad_accum",
    "checkpoint": "--init_from",
    "from_file": "--from",
    "gradient_clip_val": "--grad_clip",
}
_load_value = get_loader("yaml")


def _without_provenance(text: str) -> Any:
    """Load YAML as jsonargparse does, without the part of a run's config.yaml that holds no options."""
    loaded = _named(_load_value(text))
    return {k: v for k, v in loaded.items() if k != PROVENANCE} if isinstance(loaded, dict) else loaded


set_loader("yaml", _without_provenance, exceptions=(yaml.YAMLError,))


# How values of these types are read; jsonargparse reads all others.
_READERS: dict[Any, Any] = {int: whole_number, int | None: optional_whole_number}


class Parser(ArgumentParser):
    """jsonargparse's parser, with one-line errors that suggest the flag nearest to an unknown one."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.HelpFormatter, allow_abbrev=False)
        self.add_argument("--config", action="config", help="YAML file of flags; flags on the command line override it")

    def add_options(self, options: Sequence[Option], title: str) -> None:
        """Add a group of flags."""
        group = self.add_argument_group(title)
        for o in options:
            if o.positional:  # SUPPRESS, because a default would override the values of a YAML file
                group.add_argument(o.name, nargs="*", type=str, default=argparse.SUPPRESS, help=o.help)
                continue
            flags = [f"--{o.name}", *([ALIASES[o.name]] if o.name in ALIASES else [])]
            states_default = o.default is None or "default:" in o.help or o.name == "trainer"
            text = o.help if states_default else f"{o.help} (default: {o.default!r})"
            group.add_argument(
                *flags, type=_READERS.get(o.type, o.type), default=o.default, help=text.replace("%", "%%")
            )

    def flags(self) -> list[str]:
        """Return every flag, with its dashes."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise a one-line UserError."""
        text = " ".join(str(message).split())
        for marker in ("Unrecognized arguments: ", "unrecognized arguments: "):
            if marker in text:
                wrong = text.partition(marker)[2].split()[0].partition("=")[0]
                raise UserError(f"unknown flag {wrong}{suggestion(wrong, self.flags())}; --help lists them all")
        text = text.removeprefix("argument ")
        if text.startswith("Parser key "):
            key, _, rest = text[len("Parser key ") :].partition(":")
            text = f"--{key.strip(chr(34)).strip(chr(39))}: {rest.strip()}"
        raise UserError(text if len(text) < 500 else f"{text[:500]} ...")  # it may quote a value of any length


def suggestion(wrong: str, choices: Sequence[str]) -> str:
    """Return " (did you mean X?)" for a flag that is misspelt or has another name here, or an empty string."""
    name = wrong.removeprefix("--")
    meant = f"--trainer.{name}" if name in PASSED_ON and "--trainer" in choices else NAMES_ELSEWHERE.get(name, "")
    if meant.split(" ")[0].partition(".")[0] not in choices:
        near = difflib.get_close_matches(name, [choice.removeprefix("--") for choice in choices], n=1, cutoff=0.75)
        meant = f"--{near[0]}" if near else ""
    return f" (did you mean {meant}?)" if meant else ""


def load_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: The file cannot be read or is not a mapping; the message names the file and the line.
    """
    loaded = read_yaml(Path(path), flag="--config ")
    loaded = _named(loaded)
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"--config {path}: expected lines of the form 'flag: value'")
    if isinstance(loaded.get("on"), int):  # YAML reads 4090:1 as a number in base 60
        raise UserError(f'--config {path}: the value of on needs quotes, such as on: "4090:1"')
    return loaded


def _named(loaded: Any) -> Any:
    """Return what a YAML file holds, with the option ``on``, which YAML reads as true, under its name."""
    return {"on" if k is True else k: v for k, v in loaded.items()} if isinstance(loaded, dict) else loaded


def load_configs(paths: Sequence[str]) -> dict[str, Any]:
    """Return the content of several YAML files; a later one overrides an earlier one."""
    merged: dict[str, Any] = {}
    for path in paths:
        loaded = load_yaml(path)
        loaded.pop(PROVENANCE, None)
        for group in EXCLUSIVE:
            if single([name for name in group if loaded.get(name) is not None]):
                merged = {k: v for k, v in merged.items() if k not in group}
        merged |= loaded
    return merged


def single(given: list[str]) -> list[str]:
    """Return the given options of an exclusive group; raise a UserError if there is more than one."""
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name for name in given)} exclude each other; give one of them")
    return given


def displaced_options(argv: Sequence[str], from_files: dict[str, Any]) -> set[str]:
    """Return the options that are overridden by another one of their exclusive group, given as a flag or in a file."""
    flags = {token.partition("=")[0] for token in argv}
    displaced: set[str] = set()
    for group in EXCLUSIVE:
        given = single([name for name in group if flags & {f"--{name}", ALIASES.get(name)}])
        given = given or [name for name in group if from_files.get(name) is not None]
        displaced |= set(group) - set(given) if given else set()
    return displaced


def check_numbers(options: Iterable[Option], values: Namespace) -> None:
    """Raise a UserError if a number is outside of its option's limit."""
    for o in options:
        limit, value = o.limit or (ABOVE_ZERO if o.name in SIZES else None), values.get(o.name)
        if limit and isinstance(value, int | float) and not (math.isfinite(value) and limit.allows(value)):
            raise UserError(f"--{o.name} {value} is out of range; give {limit.expected}")


def fill(cls: type, values: Namespace) -> Any:
    """Return an options dataclass with the parsed values."""

    def plain(value: Any) -> Any:
        return value.as_dict() if isinstance(value, Namespace) else value

    for f in dataclasses.fields(cls):
        if values[f.name] is None and f.default is not None:  # a YAML file can set any option to null
            raise UserError(f"--{f.name} needs a value; leave it out for its default")
    return cls(**{f.name: plain(values[f.name]) for f in dataclasses.fields(cls)})
