"""Every recipe of configs/: it parses, says what it should, and runs for a few steps at a reduced size."""

import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
import train
from lightning_gpt.cli import parse_evaluate, parse_train

CONFIGS = Path(__file__).parents[2] / "configs"
EVALUATIONS = sorted(CONFIGS.glob("eval_*.yaml"))
TRAININGS = sorted(set(CONFIGS.glob("*.yaml")) - set(EVALUATIONS))
FLASH = CONFIGS / "train_gpt2_flash.yaml"  # which a CPU does not run
OFFLOADED = sorted(CONFIGS.glob("*_offload.yaml"))  # for 8 GPUs; tests/test_dry_run.py has them
REDUCED = (
    "--n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2 --max_steps=2 --eval_interval=2 --eval_batches=1"
    " --accelerator=cpu --precision=32 --sample_tokens=0 --logger=none --compile=false --lr_decay_steps=2"
    " --warmup_steps=1"
).split()


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory) -> Path:
    """A folder of a random GPT-2 with byte tokens, as transformers writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32, vocab_size=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    (folder / "lightning_gpt_tokenizer.json").write_text('{"name": "byte"}', encoding="ascii")
    return folder


def _flags(recipe: Path, small_gpt2: Path) -> list[str]:
    """The recipe, with a model that is here in the place of one that is downloaded."""
    named = "init_from:" in recipe.read_text(encoding="ascii")
    return [f"--config={recipe}", *([f"--init_from={small_gpt2}"] if named else [])]


@pytest.mark.parametrize("recipe", TRAININGS, ids=lambda path: path.stem)
def test_training_recipe_parses(recipe, small_gpt2):
    parse_train(_flags(recipe, small_gpt2))


@pytest.mark.parametrize("recipe", sorted(set(TRAININGS) - {FLASH, *OFFLOADED}), ids=lambda path: path.stem)
def test_training_recipe_runs_at_a_reduced_size(recipe, small_gpt2, text_file, tmp_path, capsys):
    reduced, data = REDUCED, [f"--data={text_file}", "--tokenizer=byte"]
    if parse_train(_flags(recipe, small_gpt2)).task_fields:  # has its own rows, of its own length
        reduced, data = [flag for flag in REDUCED if not flag.startswith("--block_size")], []
    train.main([*_flags(recipe, small_gpt2), *reduced, *data, *_batch(recipe), f"--out_dir={tmp_path / 'run'}"])
    out = capsys.readouterr().out
    assert ("val_accuracy" in out) == (data == [])
    assert "step 2:" in out and (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def _batch(recipe: Path) -> list[str]:
    return ["--global_batch_tokens=64"] if "global_batch_tokens" in recipe.read_text(encoding="ascii") else []


@pytest.mark.parametrize("recipe", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_recipe(recipe, small_gpt2, text_file, tmp_path):
    size = recipe.stem.removeprefix("eval_").replace("_", "-")
    assert parse_evaluate([f"--config={recipe}"]).checkpoint == size
    result = tmp_path / "score.json"
    reduced = ["--batch_size=2", "--eval_batches=2", "--accelerator=cpu", f"--json={result}"]
    evaluate.main([f"--config={recipe}", f"--checkpoint={small_gpt2}", f"--data={text_file}", *reduced])
    # Random weights of a small deviation: nearly all of 256 bytes alike.
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
def test_gpt2_recipes_are_nanogpts(name):
    config = parse_train([f"--config={CONFIGS / name}.yaml"])
    optim = config.optim
    assert (optim.learning_rate, optim.min_learning_rate, optim.warmup_steps) == (6e-4, 6e-5, 2000)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.lr_decay_steps) == (0.9, 0.95, 0.1, 600_000)
    assert config.trainer.max_steps == 600_000 and optim.global_batch_tokens == 12 * 1024 * 40


@pytest.mark.parametrize("nodes, gpus, accumulate", [(1, 1, 48), (1, 8, 6), (2, 8, 3)])
def test_global_batch_is_the_same_on_any_number_of_devices(nodes, gpus, accumulate, text_file, capsys):
    flags = ["--data", str(text_file), "--tokenizer=byte", f"--gpus={gpus}", f"--num_nodes={nodes}", "--dry_run"]
    train.main([f"--config={CONFIGS / 'train_gpt2.yaml'}", *flags])
    out = capsys.readouterr().out
    assert f"of 491,520 tokens (10 x 1024 x {accumulate} micro-batches x {nodes * gpus} devices, from --global_b" in out


def test_global_batch_trains_as_its_accumulation_does(tiny_flags, text_file, tmp_path, capsys):
    losses = []
    for name, flag in (("given", "--accumulate_grad_batches=3"), ("derived", f"--global_batch_tokens={3 * 4 * 16}")):
        flags = [*tiny_flags, "--batch_size=4", "--block_size=16", f"--data={text_file}", flag]
        train.main([*flags, f"--out_dir={tmp_path / name}"])
        losses.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")])
    assert losses[0] == losses[1] != []
    resumed = parse_train([f"--resume={tmp_path / 'derived'}", "--max_steps=9"]).optim
    assert (resumed.global_batch_tokens, resumed.accumulate_grad_batches) == (3 * 4 * 16, None)
    again = parse_train([f"--config={tmp_path / 'derived' / 'config.yaml'}"]).optim
    assert again == resumed
    resumed = parse_train([f"--resume={tmp_path / 'derived'}", "--max_steps=9", "--grad_accum=2"]).optim
    assert (resumed.global_batch_tokens, resumed.accumulate_grad_batches) == (None, 2)


def test_global_batch_that_does_not_divide(tiny_flags, text_file, tmp_path, capsys):
    flags = [*tiny_flags, "--batch_size=4", "--block_size=16", f"--data={text_file}", "--global_batch_tokens=200"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, f"--out_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--global_batch_tokens 200" in error and "give 192" in error
    assert not (tmp_path / "run").exists()
