"""Parse command lines and YAML files into config objects; report user errors in one line, with exit code 2."""

import functools
import os
import shlex
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jsonargparse import Namespace

from lightning_gpt.cli.argv import complete_flags, configs_first, gather_values, scout
from lightning_gpt.cli.nanogpt_flags import print_note, translate
from lightning_gpt.cli.parser import (
    ALIASES,
    Parser,
    check_numbers,
    displaced_options,
    fill,
    load_configs,
    suggestion,
)
from lightning_gpt.cli.start import CAN_NAME_CODE, find_start
from lightning_gpt.config import (
    SIZES,
    DataOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    TrainConfig,
    TrainerOptions,
    UserError,
)
from lightning_gpt.config.commands import EmbeddingsOptions, EvaluateOptions, PrepareOptions, SampleOptions
from lightning_gpt.data.tasks import find_task
from lightning_gpt.implementations.registry import flag_options, get_implementation
from lightning_gpt.optim.registry import optimizer_options
from lightning_gpt.options import Option, options_of

GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optimisation": OptimOptions,
    "trainer": TrainerOptions,
    "run": RunOptions,
}


def reporting_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make an entry point print a UserError as one line on stderr and exit with code 2; Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one process reports for all
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the training run that the command line describes.

    Each layer overrides the one before: declared defaults; saved settings of a resumed run, or options that the weights
    of ``--init_from`` determine; ``--config`` files; flags.

    Raises:
        UserError: The command line or a YAML file is wrong.
    """
    groups = {title: options_of(cls) for title, cls in GROUPS.items()}
    own_options = optimizer_options()
    options = [*(o for group in groups.values() for o in group), *own_options]
    argv, note = translate(sys.argv[1:] if argv is None else argv, "train")
    argv = complete_flags(argv, options)
    known = scout(argv)
    from_files = load_configs(known.config)
    command = f"train.py {shlex.join(argv)}".strip()
    trust = str(known.trust_checkpoint or from_files.get("trust_checkpoint")).lower() == "true"
    typed = {name: getattr(known, name) or from_files.get(name) for name in CAN_NAME_CODE}
    start = find_start(known, from_files, command=command, trust=trust, typed=typed)
    init_from = None if start.resumed else known.init_from or from_files.get("init_from")
    displaced = displaced_options(argv, from_files)
    saved = {name: value for name, value in start.settings.items() if name not in displaced}
    implementation = typed["implementation"] or saved.get("implementation")
    if init_from:
        from lightning_gpt.checkpoint.initial import defaults_from, open_source  # imports torch, which --help must not

        n_head = known.n_head or from_files.get("n_head")
        source = open_source(str(init_from), trust=trust, n_head=n_head, typed=[str(typed["implementation"])])
        implementation = implementation or source.implementation
        saved |= defaults_from(source, get_implementation(str(implementation)))
    if from_files.get("model_type") or any(token.partition("=")[0] == "--model_type" for token in argv):
        saved = {k: v for k, v in saved.items() if k not in SIZES}  # checked against the preset's later
    row = get_implementation(str(implementation or ModelOptions.implementation))
    model_options = flag_options(row)
    data = str(typed["data"] or saved.get("data") or DataOptions.data)
    task = find_task(data)
    task_options = options_of(task) if task else []
    taken = {o.name for o in options} | {"config", "help"} | {flag.removeprefix("--") for flag in ALIASES.values()}
    _require_distinct(model_options, taken, of=f"--implementation {row.name}")
    _require_distinct(task_options, taken | {o.name for o in model_options}, of=f"--data {data}")
    parser = Parser("Train a GPT. Every option is a flag, or a line of a YAML file.")
    for title, group in groups.items():
        parser.add_options(group, title)
        if title == "model":
            parser.add_options(model_options, f"model: fields of {row.name}'s own config")
        if title == "data" and task:
            parser.add_options(task_options, f"data: fields of the task {data}")
        if title == "optimisation":
            parser.add_options(own_options, "optimisation: options of single optimizers")
    argv = complete_flags(argv, [*model_options, *task_options])
    flags = parser.flags()
    for key in from_files:
        if f"--{key}" not in flags:
            raise UserError(f"--config {', '.join(known.config)}: unknown option {key}{suggestion('--' + key, flags)}")
    parser.set_defaults({k: v for k, v in saved.items() if f"--{k}" in flags})
    if task:  # the task sets block_size, so its default must not look like a given value
        parser.set_defaults(block_size=None)
    values = parser.parse_args(configs_first(argv))
    check_numbers([*options, *model_options], values)
    values.resume = start.checkpoint
    if not start.branches:  # a restarted command continues what it began
        values.decay_from = None
    for o in options:
        if o.name in displaced:  # another option of its exclusive group was given
            values[o.name] = o.default
    task_fields = {o.name: values[o.name] for o in task_options}
    if task:
        _fit_task(task, task_fields, values)
    print_note(note)
    return TrainConfig(
        model=fill(ModelOptions, values),
        data=fill(DataOptions, values),
        optim=fill(OptimOptions, values),
        trainer=fill(TrainerOptions, values),
        run=fill(RunOptions, values),
        model_fields={o.name: values[o.name] for o in model_options},
        optimizer_fields={o.name: values[o.name] for o in own_options},
        task_fields=task_fields,
        resumed=start.resumed,
        command=command,
    )


def _require_distinct(fields: Sequence[Option], taken: Collection[str], *, of: str) -> None:
    """Raise a UserError if a field of a user's model or task has the name of another flag."""
    for o in fields:
        if o.name in taken:
            raise UserError(f"{of}: its field {o.name} has the name of another flag of train.py; rename the field")


def _fit_task(task: type, fields: dict[str, Any], values: Namespace) -> None:
    """Set the values that a task determines; raise a UserError if others were given."""
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


def parse_options(cls: type, argv: Sequence[str] | None = None, *, description: str) -> Any:
    """Parse a command line into one options dataclass, for the smaller entry points.

    Args:
        cls: The dataclass.
        argv: The command line, without the program's name (default: this process's).
        description: First line of ``--help``.

    Raises:
        UserError: The command line or a YAML file is wrong.
    """
    options = options_of(cls)
    argv = complete_flags(sys.argv[1:] if argv is None else argv, options)
    for o in options:
        if list[str] in typing.get_args(o.type):
            argv = gather_values(argv, o.name)
    load_configs(scout(argv).config)  # for its error messages, which name the line
    parser = Parser(description)
    parser.add_options(options, "options")
    values = parser.parse_args(configs_first(argv))
    for o in options:
        if o.positional and o.name not in values:
            values[o.name] = o.default
    check_numbers(options, values)
    return fill(cls, values)


def parse_evaluate(argv: Sequence[str] | None = None) -> EvaluateOptions:
    """Return the options of ``evaluate.py``."""
    return _parse_translated(
        EvaluateOptions, argv, "evaluate", description="Score a checkpoint on its validation text."
    )


def parse_sample(argv: Sequence[str] | None = None) -> SampleOptions:
    """Return the options of ``sample.py``."""
    return _parse_translated(SampleOptions, argv, "sample", description="Write text with a trained model.")


def _parse_translated(cls: type, argv: Sequence[str] | None, command: str, *, description: str) -> Any:
    """Do the same as ``parse_options`` for a command that also has flags of nanoGPT."""
    argv, note = translate(sys.argv[1:] if argv is None else argv, command)
    options = parse_options(cls, argv, description=description)
    print_note(note)
    return options


def parse_embeddings(argv: Sequence[str] | None = None) -> EmbeddingsOptions:
    """Return the options of ``prepare.py embeddings``."""
    description = "Extract the token embeddings of a model, for train.py --pretrained_embeddings."
    return parse_options(EmbeddingsOptions, argv, description=description)


def parse_prepare(argv: Sequence[str] | None = None) -> PrepareOptions:
    """Return the options of ``prepare.py``."""
    return parse_options(PrepareOptions, argv, description="Turn text into token files, once, for any number of runs.")
