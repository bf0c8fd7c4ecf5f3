"""Runs that start from trained weights, or from another model's token embeddings."""

import csv
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import evaluate
import prepare as prepare_entry
import sample
import train
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.data.tokens.preparation import prepare
from tests.launching import run_python

REPO = Path(__file__).parents[2]
# Like tiny_flags, without sizes.
RUN = (
    "--batch_size=4 --max_steps=4 --eval_interval=2 --logger=csv --accelerator=cpu --sample_tokens=0 --eval_batches=0"
    " --learning_rate=1e-2 --log_every_n_steps=1"
).split()
SIZES = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16".split()
WTE = "transformer.wte.weight"


def trained(run: Path):
    return open_checkpoint(find_checkpoint(str(run), which="last"))


def printed(out: str) -> dict[int, float]:
    """Return the printed validation losses by step."""
    found = re.findall(r"step (\d+): (?:train_loss \S+ )?val_loss (\S+)", out)
    return {int(step): float(loss) for step, loss in found}


def score(capsys, tmp_path, *flags) -> float:
    file = tmp_path / "score.json"
    evaluate.main([*map(str, flags), "--accelerator=cpu", f"--json={file}"])
    capsys.readouterr()
    return json.loads(file.read_text())["loss"]


@pytest.fixture
def refused(refused):
    """Return a function that calls train.py with RUN's flags, checks that it refuses, and returns the line."""
    return lambda *flags, mentions=(): refused(train.main, *RUN, *flags, mentions=mentions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file) -> Path:
    """Save a random GPT-2 with transformers, and the char tokenizer of `text_file` beside it."""
    transformers = pytest.importorskip("transformers")
    tokenizer = prepare(str(text_file), tokenizer="char", block_size=8).tokenizer
    torch.manual_seed(2)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 17 * 2, "n_positions": 16, "vocab_size": tokenizer.vocab_size}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, initializer_range=0.2))
    path = tmp_path_factory.mktemp("hf") / "gpt"
    model.save_pretrained(path)
    (path / "lightning_gpt_tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
    return path


@pytest.mark.parametrize("implementation", ["nanogpt", "mingpt"])
def test_fine_tuning_starts_at_the_loss_of_the_weights(folder, tmp_path, text_file, capsys, implementation):
    before = score(capsys, tmp_path, "--checkpoint", folder, "--data", text_file)
    run = tmp_path / "run"
    flags = [*RUN, f"--init_from={folder}", f"--data={text_file}", f"--out_dir={run}"]
    train.main([*flags, f"--implementation={implementation}", "--max_steps=12", "--eval_interval=6"])
    out = capsys.readouterr().out
    losses = printed(out)
    assert list(losses) == [0, 6, 12] and losses[0] == pytest.approx(before, abs=6e-5)
    assert losses[12] < losses[0] - 0.1
    assert re.search(rf"^weights   {folder} \(huggingface\): 16 tensors, 15,\d{{3}} parameters", out, re.MULTILINE)
    with open(next(run.glob("logs/*/metrics.csv"))) as file:
        logged = [int(float(row["step"])) for row in csv.DictReader(file) if row["val_loss"]]
    assert logged == [6, 12]  # the validation before the first step is printed but not logged
    checkpoint = trained(run)
    assert checkpoint.step == 12 and checkpoint.model_config["block_size"] == 16
    assert checkpoint.implementation == implementation
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["init_from"] == str(folder) and resolved["resume"] is None


@pytest.mark.parametrize("pad", [False, True])
def test_resume_of_a_fine_tuning_run_is_exact(folder, tmp_path, text_file, capsys, refused, pad):
    flags = [*RUN, f"--init_from={folder}", f"--data={text_file}", *(["--pad_vocab"] if pad else []), "--dropout=0.2"]
    flags.append("--lr_decay_steps=4")
    train.main([*flags, f"--out_dir={tmp_path / 'whole'}"])
    train.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--max_steps=2"])
    capsys.readouterr()
    train.main([f"--resume={tmp_path / 'parts'}", "--max_steps=4"])
    assert list(printed(capsys.readouterr().out)) == [4]
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole.hash() == parts.hash() and whole.model_config == parts.model_config
    rows = (64, 44) if pad else (20, 0)
    assert (whole.model_config["vocab_size"], whole.model_config.get("vocab_padding", 0)) == rows
    assert whole.weight(WTE).shape[0] == rows[0]
    if pad:
        bare = shutil.copy(tmp_path / "whole" / "checkpoints" / "last.ckpt", tmp_path)  # without config.yaml
        sizes = "--implementation=nanogpt --n_layer=1 --n_head=2 --n_embd=34 --block_size=16 --gelu=tanh".split()
        train.main(
            [*RUN, *sizes, f"--resume={bare}", f"--data={text_file}", f"--out_dir={tmp_path / 'b'}", "--max_steps=5"]
        )
        assert trained(tmp_path / "b").model_config["vocab_padding"] == 44
        others = [*sizes[:-1], "--gelu=exact", f"--resume={bare}", f"--data={text_file}", "--max_steps=6"]
        refused(*others, mentions="whose gelu is tanh")
        sample.main([f"--checkpoint={tmp_path / 'whole'}", "--accelerator=cpu", "--temperature=99", "--prompt=the"])
        train.main([*flags, f"--init_from={tmp_path / 'whole'}", f"--out_dir={tmp_path / 'again'}", "--max_steps=1"])
        cut = [*RUN, f"--init_from={tmp_path / 'whole'}", "--pad_vocab=false", f"--data={text_file}"]
        train.main([*cut, f"--out_dir={tmp_path / 'cut'}"])
        assert trained(tmp_path / "again").model_config["vocab_padding"] == 44
        assert trained(tmp_path / "cut").weight(WTE).shape[0] == 20
        assert "vocabulary cut to 20" in capsys.readouterr().out


def test_own_checkpoint_determines_sizes_and_tokenizer(tiny_run, tmp_path, text_file, capsys):
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on the moon\n" * 60)  # fewer characters
    before = score(capsys, tmp_path, "--checkpoint", tiny_run, "--data", text_file)
    flags = [*RUN, f"--init_from={tiny_run}"]
    train.main([*flags, f"--data={text_file}", f"--out_dir={tmp_path / 'same'}", "--embd_pdrop=0"])
    assert printed(capsys.readouterr().out)[0] == pytest.approx(before, abs=6e-5)
    train.main([*flags, f"--data={other}", f"--out_dir={tmp_path / 'other'}", "--block_size=9"])
    assert "block 16 cropped to 9" in capsys.readouterr().out
    checkpoint = trained(tmp_path / "other")
    assert checkpoint.model_config["n_embd"] == 16 and checkpoint.model_config["block_size"] == 9
    assert checkpoint.tokenizer.to_dict() == trained(tiny_run).tokenizer.to_dict()
    assert checkpoint.step == 4 and checkpoint.header["TokenData"]["consumed_samples"] == 16


def test_padded_vocabulary_of_nanogpt_is_detected(tmp_path, text_file, capsys):
    """Load a checkpoint of nanoGPT, which pads the vocabulary without recording it."""
    from nanogpt.model import GPT, GPTConfig

    args = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 64, "bias": False}
    torch.manual_seed(0)
    torch.save({"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args}, tmp_path / "ckpt.pt")
    run = tmp_path / "run"
    train.main([*RUN, f"--init_from={tmp_path}", f"--data={text_file}", f"--out_dir={run}"])
    losses = printed(capsys.readouterr().out)
    train.main([f"--resume={run}", "--max_steps=6"])
    config = trained(run).model_config
    assert (config["vocab_size"], config["vocab_padding"], config["bias"], config["gelu"]) == (64, 44, False, "exact")
    assert losses[0] == pytest.approx(np.log(64), abs=0.1)


def test_pad_vocab_is_refused_by_a_model_without_padding(text_file, refused):
    flags = [
        "--implementation=tests.checkpoint.test_weights_in:Other",
        "--pad_vocab",
        "--block_size=8",
        f"--data={text_file}",
    ]
    refused(*flags, mentions="vocab_padding")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
@pytest.mark.parametrize("freeze", [True, False])
def test_pretrained_embeddings_from_a_file(tmp_path, text_file, matrix, capsys, refused, implementation, freeze):
    np.save(tmp_path / "wte.npy", matrix)
    flags = [*RUN, *SIZES, f"--data={text_file}", f"--implementation={implementation}", "--pad_vocab"]
    flags += [f"--pretrained_embeddings={tmp_path / 'wte.npy'}", f"--freeze_embeddings={freeze}"]
    train.main([*flags, f"--out_dir={tmp_path / 'run'}", "--max_steps=2"])
    out = capsys.readouterr().out
    assert 0 in printed(out) and f"embedding {tmp_path / 'wte.npy'}: 64 x 16" in out
    first = trained(tmp_path / "run")
    train.main([f"--resume={tmp_path / 'run'}", "--max_steps=4"])
    last = trained(tmp_path / "run")
    assert not torch.equal(first.weight("transformer.wpe.weight"), last.weight("transformer.wpe.weight"))
    assert torch.equal(last.weight(WTE)[:20], torch.from_numpy(matrix)) is freeze
    assert last.was_trained(WTE) is not freeze and last.was_trained("transformer.wpe.weight")
    if freeze:
        torch.testing.assert_close(last.weight(WTE)[20:], torch.from_numpy(matrix.mean(0)).expand(44, -1))
        bare = ["--freeze_embeddings=false", f"--resume={tmp_path / 'run'}", "--max_steps=5"]
        refused(*bare, mentions="--freeze_embeddings")


def test_pretrained_embeddings_of_gpt2_from_every_form(folder, tmp_path, text_file, capsys):
    expected = open_checkpoint(folder).weight(WTE)
    for wrong in ([], ["--out=a.txt"], ["other", "--out=a.npy"]):
        with pytest.raises(SystemExit):
            prepare_entry.main(["embeddings", str(folder), *wrong])
        assert capsys.readouterr().err.count("\n") == 1
    for suffix in (".npy", ".safetensors"):
        prepare_entry.main(["embeddings", str(folder), f"--out={tmp_path / f'wte{suffix}'}"])
    assert np.array_equal(np.load(tmp_path / "wte.npy"), expected.numpy())
    weights = safetensors.torch.load_file(tmp_path / "wte.safetensors")
    assert [torch.equal(tensor, expected) for tensor in weights.values()] == [True]
    safetensors.torch.save_file({"transformer.wte.weight": expected, "b": torch.ones(2)}, tmp_path / "more.safetensors")
    flags = [*RUN, "--n_layer=1", "--n_head=1", "--n_embd=34", "--block_size=8", f"--data={text_file}", "--max_steps=1"]
    for name in (folder, tmp_path / "wte.npy", tmp_path / "wte.safetensors", tmp_path / "more.safetensors"):
        run = tmp_path / f"run-{name.name}"
        train.main([*flags, f"--out_dir={run}", f"--pretrained_embeddings={name}", "--freeze_embeddings"])
        assert torch.equal(trained(run).weight(WTE), expected)


def test_embeddings_that_do_not_fit_are_refused(tmp_path, text_file, matrix, refused):
    flags = [*SIZES, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}", "--pretrained_embeddings"]
    np.save(tmp_path / "narrow.npy", matrix[:, :5])
    np.save(tmp_path / "whole.npy", matrix.astype(int))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    for name, words in (
        ("narrow.npy", "(20, 16)"),
        ("whole.npy", "floats"),
        ("objects.npy", "objects.npy"),
        ("torn.safetensors", "torn.safetensors"),
        ("two.safetensors", "wte"),
        ("none.npy", "does not exist"),
        ("none", "does not exist"),
    ):
        refused(*flags, tmp_path / name, mentions=words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_sharded_strategies_start_from_the_same_weights(folder, tmp_path, text_file, capsys, strategy):
    """Check on two ranks the loss before the first step, and frozen embeddings, also after a resume."""
    if "deepspeed" in strategy and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    before = score(capsys, tmp_path, "--checkpoint", folder, "--data", text_file)
    run = tmp_path / "run"
    flags = [*RUN, "--accelerator=cpu", "--devices=2", f"--strategy={strategy}", "--eval_batches=0"]
    flags += [f"--init_from={folder}", f"--data={text_file}", "--freeze_embeddings", f"--out_dir={run}"]
    done = run_python(REPO / "train.py", *flags, ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert printed(done.stdout)[0] == pytest.approx(before, abs=6e-5)
    train.main([f"--resume={run}", "--strategy=auto", "--devices=1", "--max_steps=6"])
    assert torch.equal(trained(run).weight(WTE), open_checkpoint(folder).weight(WTE))
    assert not trained(run).was_trained(WTE)
