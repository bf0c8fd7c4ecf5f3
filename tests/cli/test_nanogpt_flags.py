"""nanoGPT's flags and config files, and command lines of Hydra."""

import inspect

import pytest
import yaml
from lightning import Trainer

import sample
import train
from lightning_gpt.cli import parse_evaluate, parse_sample, parse_train
from lightning_gpt.config.elsewhere import PASSED_ON, TRAINER

FINETUNE = """
import time

out_dir = 'out-ft'
wandb_log = False  # feel free to turn on
wandb_project = 'texts'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'words'
gradient_accumulation_steps = 2 * 2
batch_size = 4
block_size = 16
n_layer = 1
n_head = 1
n_embd = 16
dropout = 0.2
max_iters = 600
lr_decay_iters = 600
min_lr = 1e-4
always_save_checkpoint = False
"""


@pytest.fixture
def nanogpt_folder(tmp_path, monkeypatch, text_file):
    """Return a working directory like a clone of nanoGPT, with prepared data and a config file."""
    import prepare

    monkeypatch.chdir(tmp_path)
    prepare.main([str(text_file), "--tokenizer=char", "--out=data/words"])
    (tmp_path / "config").mkdir()
    (tmp_path / "config/ft.py").write_text(FINETUNE, encoding="ascii")
    return tmp_path


def test_config_file_trains_resumes_and_samples(nanogpt_folder, capsys):
    short = (
        "--eval_iters=1 --eval_interval=2 --device=cpu --compile=False --dropout=0.0 --sample_tokens=0 --logger=none"
    )
    train.main(["config/ft.py", *short.split(), "--max_iters=2", "--lr_decay_iters=2"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: nanoGPT")]
    assert len(notes) == 1 and "python train.py --implementation=nanogpt --out_dir=out-ft" in notes[0]
    assert "--max_steps=2" in notes[0] and "time" not in notes[0]
    saved = yaml.safe_load((nanogpt_folder / "out-ft/config.yaml").read_text())
    expected = {"implementation": "nanogpt", "accumulate_grad_batches": 4, "dropout": 0.0, "max_steps": 2}
    assert saved.items() >= (expected | {"min_learning_rate": 1e-4, "accelerator": "cpu", "n_embd": 16}).items()
    train.main(["--init_from=resume", "--out_dir=out-ft", "--max_iters=3", "--lr_decay_iters=3"])
    assert "step 2" in capsys.readouterr().out
    sample.main(["--out_dir=out-ft", "--start=the", "--num_samples=2", "--max_new_tokens=3", "--device=cpu"])
    out, err = capsys.readouterr()
    assert out.count("the") >= 2 and "--checkpoint=out-ft --prompt=the" in err


def test_later_settings_override_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("max_iters = -(-3) + 4 * 2\n")
    assert parse_train(["x.py", "--max_iters=5"]).trainer.max_steps == 5
    assert parse_train(["--max_iters=5", "x.py"]).trainer.max_steps == 11


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        (
            "--dtype=bfloat16 --log_interval 7 --min_lr=0",
            "--precision=bf16 --log_every_n_steps=7 --min_learning_rate=0",
        ),
        ("--device=cuda", "--accelerator=gpu --devices=1"),
        ("--device=cuda:1", "--accelerator=gpu --devices=1,"),
        ("--device=cuda --devices=2 --backend=nccl", "--accelerator=gpu --devices=2"),
        ("--gradient_accumulation_steps=6 --devices=3", "--accumulate_grad_batches=2 --devices=3"),
        ("--bias=False", "--implementation=nanogpt --bias=false"),
        ("--wandb_log --wandb_project=p", "--logger=wandb --project=p"),
        (
            "--decay_lr=False --warmup_iters=9 --learning_rate=2",
            "--schedule=constant --warmup_steps=0 --learning_rate=2",
        ),
        ("--init_from=scratch --always_save_checkpoint=True", ""),
    ],
)
def test_flag_means_ours(flags, ours, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given, expected = parse_train(flags.split()), parse_train(ours.split())
    assert given == expected


def test_accumulation_is_divided_among_ranks(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_train(["--gradient_accumulation_steps=8"]).optim.accumulate_grad_batches == 2
    refused(train.main, "--gradient_accumulation_steps=6", mentions="a multiple of 4")


def test_sample_and_evaluate_take_nanogpt_names(capsys):
    options = parse_sample(["--init_from=resume", "--start=FILE:a.txt", "--out_dir=out", "--dtype=float32"])
    assert options == parse_sample(["--prompt_file=a.txt", "--checkpoint=out", "--precision=32"])
    options = parse_evaluate(["--out_dir=out", "--eval_iters=3", "--device=cpu"])
    assert options == parse_evaluate(["--checkpoint=out", "--eval_batches=3", "--accelerator=cpu"])


REFUSED = {
    "no folder": (["--dataset=shakespeare_char"], "python prepare.py shakespeare_char --out data/shakespeare_char"),
    "device": (["--device=tpu"], "--device=tpu"),
    "dtype": (["--dtype=int8"], "bfloat16"),
    "backend": (["--backend=gloo"], "--backend=gloo"),
    "switch": (["--decay_lr=maybe"], "--decay_lr=maybe"),
    "resume": (["--init_from=resume"], "--out_dir"),
    "no value": (["--max_iters"], "--max_iters needs a value"),
    "eval_only": (["--eval_only", "--init_from=gpt2"], "python evaluate.py --checkpoint=gpt2"),
    "no file": (["nowhere.py"], "nowhere.py"),
    "hydra": (["model=gpt2", "datamodule=adder"], "python train.py --model_type=gpt2 --data=adder"),
    "hydra config": (["--config-name=sort", "optim.lr=1"], "--config=configs/sort.yaml --learning_rate=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_what_to_type(case, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, mentions = REFUSED[case]
    refused(train.main, *flags, mentions=mentions)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("batch_size = open('made', 'w').write('x')", ["line 1", "batch_size", "not executed"]),
        ("\nprint('hi')", ["line 2"]),
        ("batch_size = 1 / 0", ["batch_size"]),
        ("batch_size = 'a' * 10**9", ["batch_size"]),
        ("volume = 11", ["volume", "no setting of nanoGPT"]),
        ("batch_size = ", ["not valid Python"]),
    ],
)
def test_config_file_is_not_executed(text, mentions, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(text)
    refused(train.main, "x.py", mentions=["x.py", *mentions])
    assert not (tmp_path / "made").exists()


def test_every_option_of_the_trainer_is_known():
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} == set(TRAINER) | PASSED_ON
