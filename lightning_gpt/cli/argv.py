"""Rewrite command lines into the form that the parser accepts."""

import argparse
import itertools
import json
import re
from collections.abc import Sequence

from lightning_gpt.cli.numbers import whole_number
from lightning_gpt.config import UserError
from lightning_gpt.invocation import find_config
from lightning_gpt.options import Option

# Values of flags that are given without one. Flags of type bool become true.
VALUES_WHEN_ALONE = {"compile": "true", "resume": "latest", "convert_only": "true", "dry_run": "true"}


def complete_flags(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Add values to flags without one, make repeated list flags append, and find the ``--config`` files."""
    argv = [
        f"--config={find_config(token.removeprefix('--config='))}"
        if token.startswith("--config=")
        else find_config(token)
        if before == "--config"
        else token
        for before, token in zip(["", *argv], argv, strict=False)
    ]
    alone = VALUES_WHEN_ALONE | {o.name: "true" for o in options if o.type is bool}
    lists = [f"--{o.name}" for o in options if o.type == list[str]]
    argv = [re.sub(f"^({'|'.join(lists)})(?==|$)", r"\1+", token) if lists else token for token in argv]
    done = []
    for token, after in zip(argv, [*argv, "--"][1:], strict=True):
        name = token.removeprefix("--")
        done.append(f"{token}={alone[name]}" if token != name and name in alone and after.startswith("--") else token)
    return done


def configs_first(argv: Sequence[str]) -> list[str]:
    """Move ``--config FILE`` to the front: in jsonargparse the last value wins, and flags should override files."""
    configs: list[str] = []
    others: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            configs += [token, *itertools.islice(tokens, 1)]
        else:
            (configs if token.startswith("--config=") else others).append(token)
    return configs + others


def gather_values(argv: Sequence[str], name: str) -> list[str]:
    """Join all values of a flag, given together or in several flags, into the single token that the parser accepts."""
    values, others, is_value = [], [], False
    for token in argv:
        flag, given, value = token.partition("=")
        is_value = flag == f"--{name}" or (is_value and not token.startswith("--"))
        if not is_value:
            others.append(token)
        elif flag != f"--{name}":
            values.append(token)
        elif given:
            values.append(value)
    if not values:
        return list(argv)
    return [*others, f"--{name}={json.dumps(values) if len(values) > 1 else values[0]}"]


def scout(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags that determine which other flags exist, before the parser is built."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--n_head", type=whole_number)
    names = (
        "implementation data resume init_from decay_from pretrained_embeddings trust_checkpoint deepspeed_config"
        " out_dir overwrite"
    )
    for name in names.split():
        parser.add_argument(f"--{name}")
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from error
    return known
