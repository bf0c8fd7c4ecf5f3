"""Parsing flags and YAML files into one resolved configuration."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train
from lightning_gpt import NanoGPT
from lightning_gpt.cli import parse_evaluate, parse_sample, parse_train
from lightning_gpt.config import UserError
from lightning_gpt.config.commands import EvaluateOptions, SampleOptions
from lightning_gpt.optim.registry import OPTIMIZERS, OptimizerRow, get_optimizer
from lightning_gpt.options import PositiveFloat
from lightning_gpt.strategies import device_arguments

REPO = Path(__file__).parents[2]


def _yaml(folder, text):
    file = folder / "given.yaml"
    file.write_text(text)
    return str(file)


def test_defaults_without_flags():
    config = parse_train([])
    assert config.model.implementation == "mingpt" and config.trainer.max_steps is None
    assert config.model_fields["embd_pdrop"] == 0.1 and config.model_fields["n_layer"] is None
    assert parse_evaluate([]) == EvaluateOptions() and parse_sample([]) == SampleOptions()


def test_flags_with_space_or_equals_sign():
    spaced = "--batch_size 3 --learning_rate 2e-3 --data a.txt --implementation nanogpt --bias false --n_layer 2"
    joined = spaced.replace(" --", "\n--").replace(" ", "=")
    config = parse_train(spaced.split())
    assert config == parse_train(joined.split())
    assert (config.data.batch_size, config.optim.learning_rate, config.data.data) == (3, 2e-3, "a.txt")
    assert config.model_fields["bias"] is False and config.model_fields["n_layer"] == 2


def test_optimizer_options_as_flags_yaml_and_arguments():
    config = parse_train(["--optimizer=muon", "--muon_learning_rate", "3e-3"])
    assert (
        config.optimizer_fields
        == {"muon_learning_rate": 3e-3}
        == {"muon_learning_rate": config.flat()["muon_learning_rate"]}
    )
    assert parse_train([]).optimizer_fields == {"muon_learning_rate": None}
    muon = get_optimizer("muon")
    assert muon.complete(config.optimizer_fields) == {"muon_learning_rate": 3e-3}
    assert muon.complete({"muon_learning_rate": None}) == muon.complete({}) == {"muon_learning_rate": 0.02}
    assert get_optimizer("adamw").complete(config.optimizer_fields) == {}


def test_new_optimizer_option_is_declared_once(monkeypatch, refused, tiny_flags, text_file):
    """Check that a row and a dataclass give a flag with limits, a default, and refusal by other optimizers."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        slowness: PositiveFloat = 3.0

    row = OptimizerRow(name="snail", build=lambda groups, **settings: (groups, settings), options=Options)
    monkeypatch.setitem(OPTIMIZERS, "snail", row)
    config = parse_train(["--optimizer=snail", "--slowness=2"])
    assert config.optimizer_fields == {"muon_learning_rate": None, "slowness": 2.0} and config.flat()["slowness"] == 2.0
    module = NanoGPT(vocab_size=5, block_size=4, model_type="gpt-nano", optimizer="snail", slowness=4.0)
    groups, settings = module.build_optimizer([])
    assert settings["slowness"] == module.hparams["slowness"] == 4.0
    start = [*tiny_flags, f"--data={text_file}"]
    refused(train.main, *start, "--slowness=2", mentions=["--slowness", "--optimizer snail", "adamw"])
    refused(train.main, *start, "--optimizer=snail", "--slowness=0", mentions="--slowness 0.0")


def test_value_may_begin_with_a_dash():
    assert parse_sample(["--prompt=--help"]).prompt == "--help"
    assert parse_sample(["--prompt", "- a list"]).prompt == "- a list"


def test_prompt_is_not_parsed_as_yaml():
    # YAML would parse these as numbers, booleans, null and so on.
    for text in ("12", "true", "null", "{a: 1}", " padded ", "\n", "2024-01-01", "caf\u00e9"):
        assert parse_sample(["--prompt", text]).prompt == text
        assert parse_train(["--prompt", text]).run.prompt == text


def test_flags_override_yaml_in_any_order(tmp_path):
    file = _yaml(tmp_path, "batch_size: 5\nblock_size: 32\nimplementation: nanogpt\nbias: false\n")
    for argv in (["--config", file, "--batch_size=7"], ["--batch_size=7", f"--config={file}"]):
        config = parse_train(argv)
        assert config.data.batch_size == 7
        assert config.model.block_size == 32 and config.model_fields["bias"] is False


def test_later_config_overrides_an_earlier_one(tmp_path):
    first = _yaml(tmp_path, "batch_size: 5\nblock_size: 32\n")
    second = tmp_path / "second.yaml"
    second.write_text("batch_size: 6\n")
    config = parse_train(["--config", first, "--config", str(second)])
    assert (config.data.batch_size, config.model.block_size) == (6, 32)


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    # YAML 1.1 parses 1e-3 as a string.
    assert parse_train(["--config", _yaml(tmp_path, "learning_rate: 1e-3\n")]).optim.learning_rate == 1e-3


def test_printed_config_round_trip(tmp_path, capsys):
    argv = ["--implementation=nanogpt", "--n_layer=2", "--compile", "--max_tokens=99", "--trainer.fast_dev_run=true"]
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--print_config"])
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert isinstance(yaml.safe_load(printed), dict)
    assert parse_train(["--config", _yaml(tmp_path, printed)]) == parse_train(argv)


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ([], "False"),
        (["--compile"], "True"),
        (["--compile", "--batch_size=2"], "True"),
        (["--compile", "dynamo"], "dynamo"),
        (["--compile=dynamo"], "dynamo"),
        (["--compile=False"], "False"),
        (["--compile", "false"], "False"),
        (["--compile=true"], "True"),
    ],
)
def test_compile_flag_spellings(flags, setting):
    assert str(parse_train(flags).trainer.compile).capitalize() == setting.capitalize()


def test_model_switch_needs_no_value(tmp_path):
    file = _yaml(tmp_path, "implementation: nanogpt\nbias: false\n")
    assert parse_train(["--config", file, "--bias"]).model_fields["bias"] is True


def test_short_flag_names():
    config = parse_train(["--grad_accum", "4", "--grad_clip=0.5"])
    assert config.optim.accumulate_grad_batches == 4 and config.optim.gradient_clip_val == 0.5


def test_gpus_are_refused_without_a_gpu():
    options = parse_train(["--gpus", "2"]).trainer
    assert options.gpus == 2
    with pytest.raises(UserError, match="GPU"):
        device_arguments(options)


@pytest.mark.parametrize(
    ("given", "name"), [("bf16", "bf16-mixed"), ("32", "32-true"), ("bf16-true", "bf16-true"), ("64", "64-true")]
)
def test_precision_names(given, name):
    options = dataclasses.replace(parse_train(["--precision", given]).trainer, accelerator="cpu")
    assert device_arguments(options)["precision"] == name


def test_half_precision_is_refused_on_a_cpu():
    options = dataclasses.replace(parse_train(["--precision=16"]).trainer, accelerator="cpu")
    with pytest.raises(UserError, match="--precision 16 needs a GPU"):
        device_arguments(options)


def test_trainer_options_keep_their_types():
    flags = ["--trainer.fast_dev_run", "3", "--trainer.benchmark=true"]
    assert parse_train(flags).trainer.trainer == {"fast_dev_run": 3, "benchmark": True}


def test_budget_flag_replaces_the_budget_of_a_file(tmp_path):
    file = _yaml(tmp_path, "max_steps: 10\n")
    for budget, value in (("max_tokens", 640), ("max_epochs", 0.5)):
        options = parse_train(["--config", file, f"--{budget}={value}"]).trainer
        assert getattr(options, budget) == value and options.max_steps is None
    assert parse_train(["--config", file]).trainer.max_steps == 10
    with pytest.raises(UserError, match="exclude each other"):
        parse_train(["--config", file, "--max_tokens=9", "--max_epochs=1"])


def test_budget_of_a_later_file_replaces_an_earlier_one(tmp_path):
    first = _yaml(tmp_path, "max_steps: 10\n")
    second = tmp_path / "second.yaml"
    second.write_text("max_epochs: 2\n")
    options = parse_train(["--config", first, "--config", str(second)]).trainer
    assert (options.max_steps, options.max_epochs) == (None, 2)


def test_default_recipe_equals_the_defaults():
    config = parse_train(["--config", str(REPO / "configs" / "default.yaml")])
    bare = parse_train([])
    assert config.model_fields == bare.model_fields and config.optim == bare.optim
    assert (config.data.batch_size, config.model.block_size) == (bare.data.batch_size, bare.model.block_size)


def test_saved_config_round_trip(tiny_run, tiny_flags, text_file):
    given = parse_train([*tiny_flags, f"--data={text_file}"]).flat()
    saved = parse_train(["--config", str(tiny_run / "config.yaml")]).flat()
    as_given = yaml.safe_load((tiny_run / "config.yaml").read_text())["_provenance"]["as_given"]
    assert saved | as_given == given and saved["warmup_steps"] == 0 and as_given["warmup_steps"] is None


def test_resume_uses_the_saved_settings(tiny_run, tiny_flags, text_file):
    given = parse_train([*tiny_flags, f"--data={text_file}"])
    config = parse_train(["--resume", str(tiny_run), "--max_steps=8"])
    assert config.run.resume == str(tiny_run / "checkpoints" / "last.ckpt")
    assert config.trainer == dataclasses.replace(given.trainer, max_steps=8)
    assert (config.model, config.data, config.optim) == (given.model, given.data, given.optim)
    assert config.run.out_dir == str(tiny_run)
    replaced = parse_train(["--resume", str(tiny_run), "--max_tokens=999"])
    assert (replaced.trainer.max_steps, replaced.trainer.max_tokens) == (None, 999)


def test_resume_without_a_value_takes_the_latest_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tiny_run.parent)
    for argv in (["--resume"], ["--resume", "--max_steps=8"], ["--resume=latest"]):
        assert parse_train(argv).run.resume == str(tiny_run / "checkpoints" / "last.ckpt")


HELP = """
import sys
import {entry} as entry
try:
    entry.main({argv!r})
except SystemExit as stop:
    assert not stop.code, stop.code
print("HEAVY", sorted({{"torch", "lightning", "numpy", "tiktoken", "transformers"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("entry", "argv", "listed"),
    [
        (
            "train",
            ["--help"],
            ["--embd_pdrop", "--learning_rate", "--muon_learning_rate", "--grad_accum", "--resume", "--n_layer"]
            + ["mingpt"],
        ),
        ("train", ["--implementation=nanogpt", "--help"], ["--bias", "--dropout"]),
        ("evaluate", ["--help"], ["--checkpoint", "--eval_batches"]),
        ("sample", ["--help"], ["--checkpoint", "--top_k"]),
    ],
)
def test_help_lists_flags_without_importing_torch(entry, argv, listed):
    code = HELP.format(entry=entry, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    for flag in listed:
        assert flag in done.stdout
    assert done.stdout.endswith("HEAVY []\n")
    if "--bias" in listed:
        assert "--embd_pdrop" not in done.stdout


def test_every_flag_has_a_help_text(capsys):
    from lightning_gpt.cli import GROUPS
    from lightning_gpt.implementations.registry import IMPLEMENTATIONS, flag_options
    from lightning_gpt.optim.registry import optimizer_options
    from lightning_gpt.options import options_of

    for row in IMPLEMENTATIONS.values():
        options = [*flag_options(row), *(o for cls in GROUPS.values() for o in options_of(cls)), *optimizer_options()]
        assert [o.name for o in options if not o.help] == []
        assert len({o.name for o in options}) == len(options)
