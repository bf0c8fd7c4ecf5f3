"""Command line and YAML to config objects; every mistake of a user's becomes one line and exit code 2."""

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_gpt.config import (
    EXCLUSIVE,
    SIZES,
    DataOptions,
    EmbeddingsOptions,
    EvaluateOptions,
    ModelOptions,
    OptimOptions,
    PrepareOptions,
    RunOptions,
    SampleOptions,
    TrainConfig,
    TrainerOptions,
    UserError,
)
from lightning_gpt.data.tasks import find_task
from lightning_gpt.implementations.registry import flag_options, get_implementation
from lightning_gpt.options import Option, options_of

GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optimisation": OptimOptions,
    "trainer": TrainerOptions,
    "run": RunOptions,
}
ALIASES = {
    "accumulate_grad_batches": "--grad_accum",
    "checkpoint": "--init_from",
    "from_file": "--from",
    "gradient_clip_val": "--grad_clip",
}
# What a flag means when it stands alone; flags of type bool mean true.
STANDING_ALONE = {"compile": "true", "resume": "latest", "convert_only": "true"}
# What numbers make sense, by flag, whichever entry point has it.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        ("batch_size", "block_size", "n_layer", "n_head", "n_embd", "accumulate_grad_batches", "eval_interval")
        + ("log_every_n_steps", "num_nodes", "learning_rate", "lr_decay_steps", "num_samples", "temperature", "top_k")
        + ("max_steps", "max_tokens", "max_epochs", "global_batch_tokens", "workers", "repetition_penalty", "stride")
        + ("muon_learning_rate",),
        (lambda value: value > 0, "a number above 0"),
    ),
    **dict.fromkeys(
        ("num_workers", "min_learning_rate", "warmup_steps", "weight_decay", "gradient_clip_val", "eval_batches")
        + ("sample_tokens", "max_new_tokens"),
        (lambda value: value >= 0, "0 or more"),
    ),
    **dict.fromkeys(("beta1", "beta2"), (lambda value: 0 <= value < 1, "at least 0 and below 1")),
    "val_fraction": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
}


class _Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line and a guess at what an unknown flag was meant to be."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise UserError(_one_line(message, [o for action in self._actions for o in action.option_strings]))


def _one_line(message: str, flags: Sequence[str]) -> str:
    text = " ".join(str(message).split())
    for marker in ("Unrecognized arguments: ", "unrecognized arguments: "):
        if marker in text:
            wrong = text.partition(marker)[2].split()[0].partition("=")[0]
            return f"unknown flag {wrong}{_nearest(wrong, flags)}; --help lists them all"
    if text.startswith("Parser key "):
        key, _, rest = text[len("Parser key ") :].partition(":")
        text = f"--{key.strip(chr(34)).strip(chr(39))}: {rest.strip()}"
    return text


def _nearest(wrong: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def reporting_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Makes an entry point print a UserError as one line on stderr and exit with code 2; Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one process speaks for all
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped


def _load_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping, or a UserError that names the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not a text in UTF-8") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"--config {path}: expected lines of the form 'flag: value'")
    return loaded


def _add(parser: ArgumentParser, options: Sequence[Option], title: str) -> None:
    group = parser.add_argument_group(title)
    for o in options:
        if o.positional:  # with a default, none on the command line would hide those of a YAML file
            group.add_argument(o.name, nargs="*", type=str, default=argparse.SUPPRESS, help=o.help)
            continue
        flags = [f"--{o.name}", *([ALIASES[o.name]] if o.name in ALIASES else [])]
        note = "" if o.default is None or "default:" in o.help or o.name == "trainer" else f" (default: {o.default!r})"
        group.add_argument(*flags, type=o.type, default=o.default, help=(o.help + note).replace("%", "%%"))


def _parser(description: str) -> _Parser:
    parser = _Parser(
        description=description, formatter_class=argparse.HelpFormatter, allow_abbrev=False, exit_on_error=True
    )
    parser.add_argument("--config", action="config", help="YAML file of flags; flags on the command line override it")
    return parser


def _complete(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Gives the flags that may stand alone their value; what may be given several times is appended."""
    alone = STANDING_ALONE | {o.name: "true" for o in options if o.type is bool}
    lists = [f"--{o.name}" for o in options if o.type == list[str]]
    argv = [re.sub(f"^({'|'.join(lists)})(?==|$)", r"\1+", token) if lists else token for token in argv]
    done = []
    for token, after in zip(argv, [*argv, "--"][1:], strict=True):
        name = token.removeprefix("--")
        done.append(f"{token}={alone[name]}" if token != name and name in alone and after.startswith("--") else token)
    return done


def _first_pass(argv: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """What must be known before the parser can be built: the YAML files' content and the flags that choose flags."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scout.add_argument("--config", action="append", default=[])
    scout.add_argument("--implementation")
    scout.add_argument("--data")
    scout.add_argument("--resume")
    scout.add_argument("--init_from")
    scout.add_argument("--pretrained_embeddings")
    scout.add_argument("--n_head", type=int)
    scout.add_argument("--trust_checkpoint")
    scout.add_argument("--out_dir")
    try:
        known, _ = scout.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    merged: dict[str, Any] = {}
    for path in known.config:
        loaded = _load_yaml(path)
        for group in EXCLUSIVE:
            if _one_of([name for name in group if loaded.get(name) is not None]):
                merged = {k: v for k, v in merged.items() if k not in group}
        merged |= loaded
    return merged, known


def _configs_first(argv: Sequence[str]) -> list[str]:
    """Moves ``--config FILE`` to the front: jsonargparse lets the later of two win, and a flag shall always."""
    configs, others, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config":
            configs += [token, *itertools.islice(tokens, 1)]
        else:
            (configs if token.startswith("--config=") else others).append(token)
    return configs + others


def _gathered(argv: Sequence[str], name: str) -> list[str]:
    """Makes the values of a flag that takes several, given together or one by one, the one token the parser wants."""
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


def _one_of(given: list[str]) -> list[str]:
    """The option of an exclusive group that is given in one place, if any."""
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name for name in given)} exclude each other; give one of them")
    return given


def _displaced(argv: Sequence[str], from_files: dict[str, Any]) -> set[str]:
    """Options whose place another of their group takes, given by a flag or else by a file."""
    flags = {token.partition("=")[0] for token in argv}
    displaced: set[str] = set()
    for group in EXCLUSIVE:
        given = _one_of([name for name in group if flags & {f"--{name}", ALIASES.get(name)}])
        given = given or [name for name in group if from_files.get(name) is not None]
        displaced |= set(group) - set(given) if given else set()
    return displaced


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The training run that the command line asks for.

    Layers, each over the one before: the declared defaults, the saved settings of a run that is resumed or what the
    weights of ``--init_from`` decide, ``--config`` files, flags.

    Raises:
        UserError: The command line or a YAML file is wrong.
    """
    groups = {title: options_of(cls) for title, cls in GROUPS.items()}
    options = [o for group in groups.values() for o in group]
    argv = _complete(list(sys.argv[1:] if argv is None else argv), options)
    from_files, known = _first_pass(argv)
    saved: dict[str, Any] = {}
    resume = known.resume or from_files.get("resume")
    for name in ("init_from", "pretrained_embeddings") if resume else ():
        if getattr(known, name):
            raise UserError(f"--{name} starts a new run and --resume goes on with one; give one of them")
    if resume:
        from lightning_gpt.checkpoint import find_checkpoint  # imports torch, which --help need not wait for

        checkpoint = find_checkpoint(resume, which="last", out_dir=known.out_dir or from_files.get("out_dir"))
        saved_path = checkpoint.parent.parent / "config.yaml"
        if saved_path.exists():
            saved = _load_yaml(str(saved_path))
            saved |= {"resume": str(checkpoint), "out_dir": str(saved_path.parent)}
    displaced = _displaced(argv, from_files)
    saved = {name: value for name, value in saved.items() if name not in displaced}
    implementation = known.implementation or from_files.get("implementation") or saved.get("implementation")
    init_from = None if resume else known.init_from or from_files.get("init_from")
    if init_from:
        from lightning_gpt.checkpoint.initial import defaults_from, open_source

        source = open_source(
            str(init_from),
            trust=_is_true(known.trust_checkpoint or from_files.get("trust_checkpoint")),
            n_head=known.n_head or from_files.get("n_head"),
        )
        implementation = implementation or source.implementation
        saved = defaults_from(source, get_implementation(str(implementation)))
        if from_files.get("model_type") or any(token.partition("=")[0] == "--model_type" for token in argv):
            saved = {k: v for k, v in saved.items() if k not in SIZES}  # the preset's are then compared with them
    row = get_implementation(str(implementation or ModelOptions.implementation))
    model_options = flag_options(row)
    data = str(known.data or from_files.get("data") or saved.get("data") or DataOptions.data)
    task = find_task(data)
    task_options = options_of(task) if task else []
    parser = _parser("Train a GPT. Every option is a flag, or a line of a YAML file.")
    for title, group in groups.items():
        _add(parser, group, title)
        if title == "model":
            _add(parser, model_options, f"model: fields of {row.name}'s own config")
        if title == "data" and task:
            _add(parser, task_options, f"data: fields of the task {data}")
    argv = _complete(argv, [*model_options, *task_options])
    flags = [o for action in parser._actions for o in action.option_strings]
    for key in from_files:
        if f"--{key}" not in flags:
            raise UserError(f"--config {', '.join(known.config)}: unknown option {key}{_nearest('--' + key, flags)}")
    parser.set_defaults({k: v for k, v in saved.items() if f"--{k}" in flags})
    if task:  # it decides the block size, so that a default must not look like one that was given
        parser.set_defaults(block_size=None)
    values = parser.parse_args(_configs_first(argv))
    _check_numbers(values)
    if resume:
        values.resume = str(checkpoint)
    for o in options:
        if o.name in displaced:  # a flag takes the place of a file's
            values[o.name] = o.default
    task_fields = {o.name: values[o.name] for o in task_options}
    if task:
        _fit_task(task, task_fields, values)
    model_fields = {o.name: values[o.name] for o in model_options}
    return TrainConfig(*(_fill(cls, values) for cls in GROUPS.values()), model_fields, task_fields)


def _fit_task(task: type, fields: dict[str, Any], values: Namespace) -> None:
    """Lets a task decide what it decides, and refuses what was given otherwise."""
    for o in options_of(task):
        if fields[o.name] is None and o.default is not None:
            raise UserError(f"--{o.name} needs a value; leave it out for its default")
    made = task(**fields)
    block_size = made.block_size
    if values.block_size not in (None, block_size):
        raise UserError(
            f"--block_size {values.block_size} does not fit --data {values.data}, whose rows have {block_size} inputs;"
            " leave it out"
        )
    for name in ("tokenizer", "tokenizer_file"):
        if values[name] is not None:
            raise UserError(f"--{name} {values[name]}: --data {values.data} has its own tokenizer; leave it out")
    values.block_size = block_size
    if values.prompt == RunOptions.prompt:
        values.prompt = made.prompt()


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"


def _check_numbers(values: Namespace) -> None:
    for name, (fits, wanted) in LIMITS.items():
        value = values.get(name)
        if isinstance(value, int | float) and not (math.isfinite(value) and fits(value)):
            raise UserError(f"--{name} {value} makes no sense; give {wanted}")


def _fill(cls: type, values: Namespace) -> Any:
    def plain(value: Any) -> Any:
        return value.as_dict() if isinstance(value, Namespace) else value

    for f in dataclasses.fields(cls):
        if values[f.name] is None and f.default is not None:  # a YAML file can say null, to any option
            raise UserError(f"--{f.name} needs a value; leave it out for its default")
    return cls(**{f.name: plain(values[f.name]) for f in dataclasses.fields(cls)})


def parse_options(cls: type, argv: Sequence[str] | None = None, *, description: str) -> Any:
    """One options dataclass from the command line, for the smaller entry points.

    Raises:
        UserError: The command line or a YAML file is wrong.
    """
    options = options_of(cls)
    argv = _complete(list(sys.argv[1:] if argv is None else argv), options)
    for o in options:
        if list[str] in typing.get_args(o.type):
            argv = _gathered(argv, o.name)
    _first_pass(argv)
    parser = _parser(description)
    _add(parser, options, "options")
    values = parser.parse_args(_configs_first(argv))
    for o in options:
        if o.positional and o.name not in values:
            values[o.name] = o.default
    _check_numbers(values)
    return _fill(cls, values)


def parse_evaluate(argv: Sequence[str] | None = None) -> EvaluateOptions:
    """The options of ``evaluate.py``."""
    return parse_options(EvaluateOptions, argv, description="Score a checkpoint on its validation text.")


def parse_sample(argv: Sequence[str] | None = None) -> SampleOptions:
    """The options of ``sample.py``."""
    return parse_options(SampleOptions, argv, description="Write text with a trained model.")


def parse_embeddings(argv: Sequence[str] | None = None) -> EmbeddingsOptions:
    """The options of ``prepare.py embeddings``."""
    description = "Take the token embeddings of a model out, for train.py --pretrained_embeddings."
    return parse_options(EmbeddingsOptions, argv, description=description)


def parse_prepare(argv: Sequence[str] | None = None) -> PrepareOptions:
    """The options of ``prepare.py``."""
    return parse_options(PrepareOptions, argv, description="Turn text into token files, once, for any number of runs.")
