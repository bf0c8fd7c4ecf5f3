"""Read nanoGPT's command lines: its flags and its ``config/*.py`` files become our flags.

``TRAIN``, ``SAMPLE`` and ``EVALUATE`` declare its names. nanoGPT's defaults are not applied. Its files are parsed and
never executed.
"""

import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gpt.cli.foreign_files import read_assignments, refuse_hydra
from lightning_gpt.config import UserError
from lightning_gpt.config.elsewhere import OTHERS, TRAINER

# The last value of each flag of a command line, nanoGPT's and ours, by its name without dashes.
Given = Mapping[str, str]


@dataclass(frozen=True)
class Setting:
    """How a setting of nanoGPT is written here.

    Attributes:
        ours: Flag that does the same, without its dashes.
        convert: Returns our flags, from the value and all given flags; None keeps the value.
        switch: Whether it is True or False.
        remark: What the note says about it.
    """

    ours: str
    convert: Callable[[str, Given], list[str]] | None = None
    switch: bool = False
    remark: str = ""

    def flags(self, value: str, given: Given) -> list[str]:
        """Return our flags for a value."""
        return self.convert(value, given) if self.convert else [f"--{self.ours}={value}"]


def _is_true(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--{name}={value} is neither True nor False")
    return value.lower() == "true"


def _dataset(value: str, given: Given) -> list[str]:
    folder = Path("data", value)
    if not (folder / "train.bin").exists():
        source = value if value in ("shakespeare_char", "shakespeare", "openwebtext") else "FILES"
        raise UserError(
            f"--dataset={value} is the folder {folder}, which has no train.bin; write it with:"
            f" python prepare.py {source} --out {folder}"
        )
    return [f"--data={folder}"]


def _accelerator(value: str) -> tuple[str, str | None]:
    """Return the accelerator of a torch device, and its index if the device names one."""
    found = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", value)
    if not found:
        raise UserError(f"--device={value} is not supported; give cpu, cuda, cuda:N or mps")
    return ("cpu" if found[1] == "cpu" else "gpu"), found[2]


def _device(value: str, given: Given) -> list[str]:
    """Return the accelerator, and one device unless a launcher or another flag decides on their number."""
    accelerator, index = _accelerator(value)
    flags = [f"--accelerator={accelerator}"]
    if accelerator == "gpu" and "WORLD_SIZE" not in os.environ and not given.keys() & {"devices", "gpus"}:
        flags.append(f"--devices={index}," if index else "--devices=1")
    return flags


def _device_of_sample(value: str, given: Given) -> list[str]:
    accelerator, index = _accelerator(value)
    if index not in (None, "0"):
        raise UserError(
            f"--device={value}: sample.py uses the first GPU; set CUDA_VISIBLE_DEVICES={index} and give --device=cuda"
        )
    return [f"--accelerator={accelerator}"]


def _dtype(value: str, given: Given) -> list[str]:
    precisions = {"float32": "32", "bfloat16": "bf16", "float16": "16"}
    if value not in precisions:
        raise UserError(f"--dtype={value} is unknown; choose one of {', '.join(precisions)}")
    return [f"--precision={precisions[value]}"]


def _accumulation(value: str, given: Given) -> list[str]:
    """Divide the micro-batches of all processes among them, as nanoGPT does; without a launcher it has one."""
    if not value.isdecimal() or not int(value):
        raise UserError(f"--gradient_accumulation_steps={value} is out of range; give a whole number above 0")
    flags = []
    if "WORLD_SIZE" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
    elif "device" in given or given.keys() & {"devices", "gpus"}:
        ranks = _number_of_devices(given.get("gpus") or given.get("devices", "1")) * int(given.get("num_nodes", "1"))
    else:
        ranks, flags = 1, ["--devices=1"]
    if int(value) % ranks:
        raise UserError(
            f"--gradient_accumulation_steps={value} counts the micro-batches of all {ranks} devices;"
            f" give a multiple of {ranks}"
        )
    return [*flags, f"--accumulate_grad_batches={int(value) // ranks}"]


def _number_of_devices(given: str) -> int:
    listed = [part for part in given.split(",") if part]
    if not all(part.isdecimal() for part in listed) or given in ("", "0"):
        raise UserError(
            f"--gradient_accumulation_steps counts the micro-batches of all devices, but --devices {given} does not say"
            " how many there are; give a number, or --accumulate_grad_batches for each device"
        )
    return len(listed) if "," in given else int(given)


def _start_of_training(value: str, given: Given) -> list[str]:
    if value == "scratch":
        return []
    if value != "resume":
        return [f"--init_from={value}"]
    if "out_dir" not in given:
        raise UserError("--init_from=resume continues the run in --out_dir; give its folder")
    return [f"--resume={given['out_dir']}"]


def _model(value: str, given: Given) -> list[str]:
    return [] if value == "resume" else [f"--checkpoint={value}"]


def _model_in_folder(value: str, given: Given) -> list[str]:
    return [f"--checkpoint={value}"] if given.get("init_from", "resume") == "resume" else []


def _prompt(value: str, given: Given) -> list[str]:
    return [f"--prompt_file={value.removeprefix('FILE:')}" if value.startswith("FILE:") else f"--prompt={value}"]


def _wandb(value: str, given: Given) -> list[str]:
    return ["--logger=wandb"] if _is_true("wandb_log", value) else []


def _every_save(value: str, given: Given) -> list[str]:
    _is_true("always_save_checkpoint", value)
    return []


def _backend(value: str, given: Given) -> list[str]:
    on_cpu = "cpu" in (given.get("device"), given.get("accelerator"))
    if value != ("gloo" if on_cpu else "nccl"):
        raise UserError(f"--backend={value}: Lightning uses nccl on GPUs, and gloo with --device=cpu; leave it out")
    return []


def _evaluation_only(value: str, given: Given) -> list[str]:
    if not _is_true("eval_only", value):
        return []
    kept = {name: text for name, text in given.items() if name in EVALUATE or name in _SAME["evaluate"]}
    flags = [flag for name, text in kept.items() for flag in EVALUATE.get(name, Setting(name)).flags(text, given)]
    raise UserError(f"--eval_only: train.py always trains; to score, run: python evaluate.py {shlex.join(flags)}")


def _decay(value: str, given: Given) -> list[str]:
    """Return the flags of nanoGPT's constant learning rate, which has no warm-up either."""
    return [] if _is_true("decay_lr", value) else ["--schedule=constant", "--warmup_steps=0"]


def _unless_constant(ours: str) -> Callable[[str, Given], list[str]]:
    """Return a conversion of a setting of the schedule, which decay_lr=False turns off."""
    return lambda value, given: [] if given.get("decay_lr", "").lower() == "false" else [f"--{ours}={value}"]


TRAIN = {
    "max_iters": Setting("max_steps"),
    "eval_iters": Setting("eval_batches"),
    "log_interval": Setting("log_every_n_steps"),
    "lr_decay_iters": Setting("lr_decay_steps", _unless_constant("lr_decay_steps")),
    "warmup_iters": Setting("warmup_steps", _unless_constant("warmup_steps")),
    "min_lr": Setting("min_learning_rate", _unless_constant("min_learning_rate")),
    "decay_lr": Setting("schedule", _decay, switch=True),
    "dataset": Setting("data", _dataset),
    "device": Setting("accelerator", _device),
    "dtype": Setting("precision", _dtype),
    "backend": Setting("accelerator", _backend),
    "gradient_accumulation_steps": Setting("accumulate_grad_batches", _accumulation),
    "init_from": Setting("init_from", _start_of_training),
    "eval_only": Setting("eval_batches", _evaluation_only, switch=True),
    "always_save_checkpoint": Setting(
        "save_interval", _every_save, switch=True, remark="checkpoints/best and checkpoints/last are both kept"
    ),
    "wandb_log": Setting("logger", _wandb, switch=True),
    "wandb_project": Setting("project"),
    "wandb_run_name": Setting("run_name"),
}
SAMPLE = {
    "start": Setting("prompt", _prompt),
    "init_from": Setting("checkpoint", _model),
    "out_dir": Setting("checkpoint", _model_in_folder),
    "device": Setting("accelerator", _device_of_sample),
    "dtype": Setting("precision", _dtype),
}
EVALUATE = {
    "init_from": Setting("checkpoint", _model),
    "out_dir": Setting("checkpoint", _model_in_folder),
    "dataset": Setting("data", _dataset),
    "eval_iters": Setting("eval_batches"),
    "device": Setting("accelerator", _device),
    "dtype": Setting("precision", _dtype),
}
_COMMANDS = {"train": TRAIN, "sample": SAMPLE, "evaluate": EVALUATE}
# nanoGPT's settings that have the same name and meaning here.
_SAME = {
    "train": frozenset(
        "out_dir eval_interval batch_size block_size n_layer n_head n_embd dropout bias"
        " learning_rate weight_decay beta1 beta2 grad_clip compile".split()
    ),
    "sample": frozenset("num_samples max_new_tokens temperature top_k seed compile".split()),
    "evaluate": frozenset(["batch_size"]),
}
# Fields of nanoGPT's model that minGPT does not have.
_NANOGPT_ONLY = {"bias", "dropout"}

# Settings that a resumed run takes over; the others belong to the machine, or are flags of this command.
_RESUMED = {
    *("max_iters", "eval_iters", "log_interval", "lr_decay_iters", "warmup_iters", "min_lr", "eval_interval"),
    *("batch_size", "dropout", "learning_rate", "weight_decay", "beta1", "beta2"),
}

# Our flags for the names of other programs, for "did you mean".
NAMES_ELSEWHERE = {name: flag for name, flag in TRAINER.items() if flag} | OTHERS
NAMES_ELSEWHERE |= {name: f"--{setting.ours}" for name, setting in (TRAIN | SAMPLE).items()}


@dataclass(frozen=True)
class _Given:
    """A flag of the command line or of a file; or a token that belongs to no flag, whose name is empty."""

    name: str
    value: str | None
    tokens: list[str]
    in_file: bool = False


def translate(argv: Sequence[str], command: str) -> tuple[list[str], str]:
    """Return a command line in which nanoGPT's flags and files are replaced by our flags, and a note about them.

    Args:
        argv: The command line, without the program's name.
        command: train, sample or evaluate.

    Returns:
        The command line, and one line that shows it; the line is empty if nothing was replaced.

    Raises:
        UserError: A value is wrong, a setting has no counterpart, a file is more than assignments of constants, or the
            command line is one of Hydra's.
    """
    table = _COMMANDS[command]
    if command == "train":
        refuse_hydra(argv, NAMES_ELSEWHERE)
    items = list(_read(argv, command))
    given = {item.name: item.value for item in items if item.value is not None}
    last = {item.name: place for place, item in enumerate(items)}
    done, remarks = [], []
    for place, item in enumerate(items):
        if item.name not in table:
            done += item.tokens
        elif place == last[item.name]:
            if item.value is None:
                raise UserError(f"--{item.name} needs a value")
            ours = table[item.name].flags(item.value, given)
            if ours == [f"--{item.name}={item.value}"]:  # our flag of the same name and meaning
                ours = item.tokens
            done += ours
            remarks += [f"{item.name}: {table[item.name].remark}"] if table[item.name].remark else []
    has_file = any(item.in_file for item in items)
    if command == "train" and _starts_anew(given) and (has_file or given.keys() & _NANOGPT_ONLY):
        done = [*([] if "implementation" in given else ["--implementation=nanogpt"]), *done]
        if has_file and not given.keys() & {"data", "dataset"}:
            remarks.append("no dataset is named, so --data is the default one")
    if done == list(argv):
        return done, ""
    return done, "; ".join([f"note: nanoGPT's settings, here: python {command}.py {shlex.join(done)}", *remarks])


def resumed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options for the settings that nanoGPT stores in its ``ckpt.pt``.

    Args:
        config: The settings, under nanoGPT's names; those of another type than nanoGPT's are left out.
    """
    numbers = {name: value for name, value in config.items() if type(value) in (int, float)}
    options = {TRAIN[name].ours if name in TRAIN else name: numbers[name] for name in _RESUMED & numbers.keys()}
    if "grad_clip" in numbers:
        options["gradient_clip_val"] = numbers["grad_clip"]
    sizes = [numbers.get(name) for name in ("gradient_accumulation_steps", "batch_size", "block_size")]
    if all(isinstance(size, int) and size > 0 for size in sizes):
        # nanoGPT counts the micro-batches of all processes.
        options["global_batch_tokens"] = math.prod(size for size in sizes if size)
    if config.get("decay_lr") is False:
        options = {k: v for k, v in options.items() if k not in ("lr_decay_steps", "min_learning_rate")}
        options |= {"schedule": "constant", "warmup_steps": 0}
    return options


def print_note(note: str) -> None:
    """Print the note of ``translate`` to stderr, on the first process of each machine."""
    if note and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(note, file=sys.stderr)


def _starts_anew(given: Given) -> bool:
    """Return whether the command line alone decides on the model, or takes it from the published GPT-2."""
    source = given.get("init_from", "scratch")
    return not given.keys() & {"resume", "config"} and (source == "scratch" or source.startswith("gpt2"))


def _read(argv: Sequence[str], command: str) -> Iterator[_Given]:
    """Yield the flags of a command line in its order, with the settings of a file in the place of its name."""
    switches = {name for name, setting in _COMMANDS[command].items() if setting.switch}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            yield from _read_file(token, command) if token.endswith(".py") else [_Given("", None, [token])]
        elif equals:
            yield _Given(name, value, [token])
        elif tokens and not tokens[0].startswith("--") and not (tokens[0].endswith(".py") and name in switches):
            value = tokens.pop(0)
            yield _Given(name, value, [token, value])
        else:
            yield _Given(name, "True" if name in switches else None, [token])


def _read_file(path: str, command: str) -> Iterator[_Given]:
    """Yield the settings of a file that concern a command."""
    for name, value, line in read_assignments(path, optional={"wandb_run_name"}):
        if name in _COMMANDS[command] or name in _SAME[command]:
            yield _Given(name, value, [f"--{name}={value}"], in_file=True)
        elif not any(name in table for table in (*_COMMANDS.values(), *_SAME.values())):
            raise UserError(f"{path}, line {line}: {name} is no setting of nanoGPT")
