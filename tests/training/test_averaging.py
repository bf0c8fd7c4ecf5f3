"""--ema: the average follows its recursion, and is what is validated, saved, loaded, scored and resumed."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback

import evaluate
import lightning_gpt
import train
from lightning_gpt.cli import parse_train
from lightning_gpt.training.saving import save_last
from tests.launching import run_python

REPO = Path(__file__).parents[2]
DECAY = 0.75
STEPS = 6
AVERAGED = [
    "--implementation=nanogpt",
    f"--ema={DECAY}",
    "--learning_rate=0.01",
    "--lr_decay_steps=6",
    "--eval_interval=3",
    "--sample_tokens=0",
]


def weights(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def saved(run: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)[key]


def assert_equal(a, b, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


class Watch(Callback):
    """Record the weights of each step, and save within the validation at step 3, as a signal does."""

    def __init__(self) -> None:
        self.steps, self.validated, self.saved_within = [], [], None

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == 3 and self.saved_within is None:
            self.validated.append(weights(pl_module))
            path = save_last(trainer)
            self.saved_within = torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file, tiny_flags) -> tuple[Path, Watch]:
    """Train with an average, two micro-batches per step."""
    watch, out_dir = Watch(), tmp_path_factory.mktemp("ema") / "run"
    flags = [*tiny_flags, *AVERAGED, f"--data={text_file}", "--grad_accum=2", f"--max_steps={STEPS}", "--seed=3"]
    lightning_gpt.train(parse_train([*flags, f"--out_dir={out_dir}"]), callbacks=[watch])
    return out_dir, watch


def test_average_follows_its_recursion(run):
    out_dir, watch = run
    averages = [{name: tensor.double() for name, tensor in watch.steps[0].items()}]
    for step in watch.steps[1:]:
        averages.append({name: DECAY * old + (1 - DECAY) * step[name] for name, old in averages[-1].items()})
    float32 = [{name: tensor.float() for name, tensor in average.items()} for average in averages]
    assert len(float32) == STEPS
    assert max((a - b).abs().max() for a, b in zip(float32[-1].values(), watch.steps[-1].values(), strict=True)) > 1e-3
    assert_equal(saved(out_dir), float32[-1], 1e-6)
    assert_equal(saved(out_dir, "current_model_state"), watch.steps[-1])
    # A validation runs on the average, and a save within it does not confuse the two.
    assert_equal(watch.validated[0], float32[2], 1e-6)
    assert_equal(watch.saved_within["state_dict"], float32[2], 1e-6)
    assert_equal(watch.saved_within["current_model_state"], watch.steps[2])


def test_average_is_what_is_loaded_and_scored(run, tmp_path):
    out_dir, _ = run
    module, _ = lightning_gpt.load(out_dir, which="last")
    assert_equal(dict(module.state_dict()), saved(out_dir))
    result = tmp_path / "score.json"
    evaluate.main([f"--checkpoint={out_dir}", "--which=last", "--accelerator=cpu", f"--json={result}"])
    validated = json.loads((out_dir / "run.json").read_text())["val_loss"]
    assert json.loads(result.read_text())["loss"] == pytest.approx(validated, abs=1e-5)


def test_resumed_average_is_bit_identical(run, tmp_path, text_file, tiny_flags, refused, capsys):
    out_dir, _ = run
    parts = tmp_path / "parts"
    flags = [*tiny_flags, *AVERAGED, f"--data={text_file}", "--grad_accum=2", "--seed=3"]
    train.main([*flags, "--max_steps=4", f"--out_dir={parts}"])
    refused(train.main, f"--resume={parts}", "--max_steps=6", "--strategy=fsdp", mentions="choose auto or ddp")
    train.main([f"--resume={parts}", f"--max_steps={STEPS}"])
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_equal(saved(parts, key), saved(out_dir, key))
    # A converted checkpoint has the average only, so training cannot go on from it.
    evaluate.main([f"--checkpoint={parts}", "--which=last", "--convert_only"])
    capsys.readouterr()
    converted = parts / "checkpoints" / "last"
    refused(
        train.main,
        f"--resume={converted}",
        f"--data={text_file}",
        "--max_steps=9",
        mentions="holds only the average of the weights",
    )
    # Without --ema training goes on from the weights, and keeps them alone.
    train.main([f"--resume={parts}", "--ema=0", "--max_steps=7", f"--out_dir={tmp_path / 'off'}"])
    assert "current_model_state" not in torch.load(tmp_path / "off/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_average_is_resumed_on_two_ranks(run, tmp_path, text_file, tiny_flags):
    out_dir, _ = run
    parts = tmp_path / "parts"
    flags = [*tiny_flags, *AVERAGED, f"--data={text_file}", "--grad_accum=2", "--seed=3"]
    train.main([*flags, "--max_steps=4", f"--out_dir={parts}"])
    two = ["--strategy=ddp", "--devices=2", "--batch_size=2", f"--max_steps={STEPS}"]
    done = run_python(REPO / "train.py", f"--resume={parts}", *two, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(saved(parts), saved(out_dir), 1e-4)
    assert_equal(saved(parts, "current_model_state"), saved(out_dir, "current_model_state"), 1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy=deepspeed_stage_2"], "--ema 0.75 does not work under --strategy deepspeed_stage_2, which shards"),
        (["--precision=bf16-true"], "--ema 0.75 would be rounded away in weights of --precision bf16-true"),
        (["--ema=1"], "--ema 1.0 is out of range"),
    ],
)
def test_average_that_cannot_be_kept_is_refused(flags, message, refused, tiny_flags, text_file, tmp_path):
    refused(
        train.main,
        *tiny_flags,
        *AVERAGED,
        f"--data={text_file}",
        *flags,
        f"--out_dir={tmp_path / 'r'}",
        mentions=message,
    )
    assert not (tmp_path / "r").exists()


def test_plan_counts_the_average(tiny_flags, text_file, capsys):
    train.main([*tiny_flags, f"--data={text_file}", "--n_embd=256", "--dry_run", "--ema=0.9"])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " MiB" in line)
    needed = {name: float(text.split()[0]) for name, text in lines.items()}
    # AdamW keeps two numbers per weight, and the average is a third.
    assert needed["optimizer"] == pytest.approx(3 * needed["weights"], abs=0.2)
    assert needed["peak"] >= needed["weights"] + needed["gradients"] + needed["optimizer"] - 0.2
