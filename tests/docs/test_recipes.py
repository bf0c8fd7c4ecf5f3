"""Recipes of configs/: all parse with the expected values, and one of each kind runs at a reduced size."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
import train
from lightning_gpt.cli import parse_evaluate, parse_train
from lightning_gpt.data.tasks import TASKS

CONFIGS = Path(__file__).parents[2] / "configs"
EVALUATIONS = sorted(CONFIGS.glob("eval_*.yaml"))
TRAININGS = sorted(set(CONFIGS.glob("*.yaml")) - set(EVALUATIONS))
FLASH = CONFIGS / "train_gpt2_flash.yaml"  # refused on a CPU
# One recipe of each kind: the others differ from it in numbers only (test_recipes_of_a_kind_differ_in_numbers_only).
KINDS = {
    "adder": ["adder_3digit"],
    "default": ["chargpt"],
    "finetune_shakespeare": [],
    "mingpt_1.7b_offload": ["mingpt_10b_offload", "mingpt_20b_offload", "mingpt_45b_offload"],
    "shakespeare_char_cpu": ["train_shakespeare_char"],
    "shakespeare_char_modern": [],
    "sort": [],
    "train_gpt2": [],
    "train_gpt2_alibi": [],
    "train_gpt2_flash": [],
}
RUN_ELSEWHERE = {"train_gpt2_flash", "mingpt_1.7b_offload"}  # in a test below, and in tests/planning/test_dry_run.py
REDUCED = (
    "--n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2 --max_steps=2 --eval_interval=2 --eval_batches=1"
    " --accelerator=cpu --precision=32 --sample_tokens=0 --logger=none --compile=false --lr_decay_steps=2"
    " --warmup_steps=1"
).split()


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory) -> Path:
    """Save a random GPT-2 with transformers, with a byte tokenizer, and return the folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32, vocab_size=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    (folder / "lightning_gpt_tokenizer.json").write_text('{"name": "byte"}', encoding="ascii")
    return folder


def _flags(recipe: Path, small_gpt2: Path) -> list[str]:
    """Return the flags of a recipe; a small local model replaces one that would be downloaded."""
    named = "init_from:" in recipe.read_text(encoding="ascii")
    return [f"--config={recipe}", *([f"--init_from={small_gpt2}"] if named else [])]


@pytest.mark.parametrize("recipe", TRAININGS, ids=lambda path: path.stem)
def test_training_recipe_parses(recipe, small_gpt2):
    parse_train(_flags(recipe, small_gpt2))


def test_recipes_of_a_kind_differ_in_numbers_only(small_gpt2):
    kinds = {CONFIGS / f"{name}.yaml": [CONFIGS / f"{other}.yaml" for other in KINDS[name]] for name in KINDS}
    assert sorted([*kinds, *sum(kinds.values(), [])]) == TRAININGS
    for recipe, others in kinds.items():
        for other in others:
            assert _choices(other, small_gpt2) == _choices(recipe, small_gpt2)


def _choices(recipe: Path, small_gpt2: Path) -> dict[str, object]:
    """Return all settings but numbers, preset sizes, the text and the prompt."""
    settings = parse_train(_flags(recipe, small_gpt2)).flat()
    is_task = settings["data"] in TASKS
    free = {"prompt", "model_type", *([] if is_task else ["data", "tokenizer"])}
    numbers = (int, float, type(None))
    return {k: v for k, v in settings.items() if k not in free and (isinstance(v, bool) or not isinstance(v, numbers))}


@pytest.mark.parametrize("name", sorted(set(KINDS) - RUN_ELSEWHERE))
def test_training_recipe_runs_at_a_reduced_size(name, small_gpt2, text_file, tmp_path, capsys):
    recipe = CONFIGS / f"{name}.yaml"
    reduced, data = REDUCED, [f"--data={text_file}", "--tokenizer=byte"]
    config = parse_train(_flags(recipe, small_gpt2))
    if config.task_fields:  # a task has its own rows, of its own length
        reduced, data = [flag for flag in REDUCED if not flag.startswith("--block_size")], []
    batch = ["--global_batch_tokens=64"] if config.optim.global_batch_tokens else []
    train.main([*_flags(recipe, small_gpt2), *reduced, *data, *batch, f"--out_dir={tmp_path / 'run'}"])
    out = capsys.readouterr().out
    assert ("val_accuracy" in out) == (data == [])
    assert "step 2:" in out and (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_evaluation_recipes_parse_and_run(small_gpt2, text_file, tmp_path):
    parsed = {recipe.stem: parse_evaluate([f"--config={recipe}"]) for recipe in EVALUATIONS}
    for name, options in parsed.items():
        assert options.checkpoint == name.removeprefix("eval_").replace("_", "-")
        assert dataclasses.replace(options, checkpoint="gpt2") == parsed["eval_gpt2"]
    result = tmp_path / "score.json"
    reduced = ["--batch_size=2", "--eval_batches=2", "--accelerator=cpu", f"--json={result}"]
    evaluate.main(
        [f"--config={EVALUATIONS[0]}", f"--checkpoint={small_gpt2}", f"--data={text_file}", *reduced],
    )
    # Random weights of a small standard deviation give all 256 bytes nearly the same probability.
    assert json.loads(result.read_text())["loss"] == pytest.approx(math.log(256), abs=0.1)


def test_flash_recipe_is_refused_without_a_gpu_and_planned_for_one(text_file, tmp_path, capsys):
    flags = [f"--config={FLASH}", *REDUCED, f"--data={text_file}", "--tokenizer=byte", "--global_batch_tokens=64"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, f"--out_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: attention=flash is not") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--accelerator=gpu", "--devices=1", "--precision=bf16", "--dry_run"])
    assert "bf16-mixed, gpu" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_gpt2", "train_gpt2_alibi", "train_gpt2_flash"])
def test_gpt2_recipes_match_nanogpt(name):
    config = parse_train([f"--config={CONFIGS / name}.yaml"])
    optim = config.optim
    assert (optim.learning_rate, optim.min_learning_rate, optim.warmup_steps) == (6e-4, 6e-5, 2000)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.lr_decay_steps) == (0.9, 0.95, 0.1, 600_000)
    assert config.trainer.max_steps == 600_000 and optim.global_batch_tokens == 12 * 1024 * 40


@pytest.mark.parametrize("nodes, gpus, accumulate", [(1, 1, 48), (1, 8, 6), (2, 8, 3)])
def test_global_batch_is_independent_of_the_number_of_devices(nodes, gpus, accumulate, text_file, capsys):
    flags = [f"--data={text_file}", "--tokenizer=byte", f"--gpus={gpus}", f"--num_nodes={nodes}", "--dry_run"]
    flags += ["--n_layer=1", "--n_head=1", "--n_embd=16"]
    train.main([f"--config={CONFIGS / 'train_gpt2.yaml'}", *flags])
    out = capsys.readouterr().out
    assert f"of 491,520 tokens (10 x 1024 x {accumulate} micro-batches x {nodes * gpus} devices, from --global_b" in out


def test_global_batch_trains_as_explicit_accumulation(tiny_flags, text_file, tmp_path, capsys):
    losses = []
    for name, flag in (("given", "--accumulate_grad_batches=3"), ("derived", f"--global_batch_tokens={3 * 4 * 16}")):
        flags = [*tiny_flags, "--batch_size=4", "--block_size=16", f"--data={text_file}", flag]
        train.main([*flags, f"--out_dir={tmp_path / name}"])
        losses.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")])
    assert losses[0] == losses[1] != []
    resumed = parse_train([f"--resume={tmp_path / 'derived'}", "--max_steps=9"]).optim
    assert (resumed.global_batch_tokens, resumed.accumulate_grad_batches) == (3 * 4 * 16, None)
    again = parse_train([f"--config={tmp_path / 'derived' / 'config.yaml'}"]).optim
    assert (again.global_batch_tokens, again.accumulate_grad_batches) == (3 * 4 * 16, None)
    resumed = parse_train([f"--resume={tmp_path / 'derived'}", "--max_steps=9", "--grad_accum=2"]).optim
    assert (resumed.global_batch_tokens, resumed.accumulate_grad_batches) == (None, 2)


def test_global_batch_that_does_not_divide_is_refused(tiny_flags, text_file, tmp_path, capsys):
    flags = [*tiny_flags, "--batch_size=4", "--block_size=16", f"--data={text_file}", "--global_batch_tokens=200"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, f"--out_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--global_batch_tokens 200" in error and "give 192" in error
    assert not (tmp_path / "run").exists()
